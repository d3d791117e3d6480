# make look: a first look.   make toy: all stages of the toy setup.   make test: all tests.
PYTHON ?= python3
VENV = .venv
RUN = $(VENV)/bin/python
# The scripts need what is installed there: said when it is made, and again where the first command of one's own comes.
HOW = @echo "To run the scripts yourself, first type:  source $(VENV)/bin/activate"

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
	$(HOW)

toy: $(VENV)/installed
	$(RUN) -m toy
	$(HOW)

# Two short runs of GRPO from the shipped cold start, and an HTML report, in about two minutes.
look: $(VENV)/installed
	$(RUN) -m toy.look
	$(HOW)

# The same as toy, and two more trainings: on video only and on audio only.
toy-modalities: $(VENV)/installed
	$(RUN) -m toy --modalities
	$(HOW)

# The lesson's own tests alone, in under a minute.
lesson: $(VENV)/installed
	$(RUN) -m pytest -q tests/test_*.py

# Two processes, a file of tests to each in turn: many tests start programs of two ranks themselves.
test: $(VENV)/installed
	$(RUN) -m pytest -q -n 2 --dist loadfile tests

clean:
	rm -rf runs $(VENV) .pytest_cache

.PHONY: toy look toy-modalities lesson test clean
