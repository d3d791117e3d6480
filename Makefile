# make look, make toy and make test need nothing else: the packages are installed into .venv first.
PYTHON ?= python3
VENV = .venv
RUN = $(VENV)/bin/python
HOW = @echo "To run the scripts yourself, first type:  source $(VENV)/bin/activate"

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
	$(HOW)

# Every stage of the paper on toy data: clips, cold start, RL, evaluation, report.
toy: $(VENV)/installed
	$(RUN) -m toy
	$(HOW)

# Two short runs from a cold start that is part of the repository, and a report.
look: $(VENV)/installed
	$(RUN) -m toy.look
	$(HOW)

# The same as toy, and two more trainings: on video only and on audio only.
toy-modalities: $(VENV)/installed
	$(RUN) -m toy --modalities
	$(HOW)

# Correctness. Two processes, because many tests start programs of two ranks themselves.
test: $(VENV)/installed
	$(RUN) -m pytest -q -n 2 --dist loadfile tests

# The tests of the eight scripts alone.
lesson: $(VENV)/installed
	$(RUN) -m pytest -q tests/test_*.py

# How the code reads: ruff, and the rules that ruff does not have.
style: $(VENV)/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check "ruff>=0.17,<0.18"
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest -q tests/house.py

clean:
	rm -rf runs $(VENV) .pytest_cache

.PHONY: toy look toy-modalities test lesson style clean
