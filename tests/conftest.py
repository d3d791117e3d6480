"""Shared by all tests: the golden checkpoint, what the public reference computed with it,
offline mode."""

import os
import sys
from pathlib import Path

# before any import that reads it: a test never needs the network
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch

from data import Processor, PromptBatch
from lib.modalities import AUDIO
from model import HumanOmni

torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other
GOLDEN = Path(__file__).parent / "golden"  # see golden/README.md: made by the reference code


def load_golden_model() -> HumanOmni:
    return HumanOmni.from_pretrained(
        GOLDEN / "humanomni", bert=GOLDEN / "bert", log=lambda line: None
    )


@pytest.fixture(scope="session")
def model() -> HumanOmni:
    """The golden checkpoint in fp32. Shared: a test that changes it takes `fresh_model`."""
    return load_golden_model()


@pytest.fixture
def fresh_model() -> HumanOmni:
    return load_golden_model()


@pytest.fixture(scope="session")
def processor() -> Processor:
    return Processor.from_pretrained(GOLDEN / "humanomni", bert=GOLDEN / "bert")


@pytest.fixture(scope="session")
def forward() -> dict:
    """forward.pt with its media in fp32."""
    golden = torch.load(GOLDEN / "forward.pt", weights_only=True)
    return golden | {"frames": golden["frames"].float(), "mel": golden["mel"].float()}


@pytest.fixture(scope="session")
def grpo_golden() -> dict:
    return torch.load(GOLDEN / "grpo.pt", weights_only=True)


@pytest.fixture(scope="session")
def prompt(model, forward) -> tuple[torch.Tensor, torch.Tensor]:
    """(embeds (2, P, D), mask (2, P)) of the golden prompts."""
    with torch.no_grad():
        return model.embed_prompt(
            *(forward[k] for k in ("input_ids", "frames", "mel", "question_ids", "question_mask"))
        )


@pytest.fixture(scope="session")
def batch(forward) -> PromptBatch:
    """The two golden prompts with their media, as a loader gives them."""
    return PromptBatch(
        indices=[0, 1],
        samples=[None] * 2,
        questions=[""] * 2,
        input_ids=forward["input_ids"].tolist(),
        targets=[[], []],
        media={"video": forward["frames"], "audio": forward["mel"]},
        features={"video": [None] * 2, "audio": [None] * 2},
        question_ids=forward["question_ids"],
        question_mask=forward["question_mask"],
        feature_keys=[{"video": "", "audio": ""}] * 2,
        bad=[],
        notes=[],
    )


def three_prompts(forward: dict, indices: list[int], samples: list) -> PromptBatch:
    """Three golden prompts of two lengths, one without sound, as a loader gives them."""
    silent = [i for i in forward["input_ids"][0].tolist() if i != AUDIO]
    rows = [0, 1, 0]
    return PromptBatch(
        indices=indices,
        samples=samples,
        questions=[""] * 3,
        input_ids=[*forward["input_ids"].tolist(), silent],
        targets=[[5, 6, 7, 2], [8, 2], [9] * 6],
        media={"video": forward["frames"][rows], "audio": forward["mel"]},
        features={"video": [None] * 3, "audio": [None] * 2},
        question_ids=forward["question_ids"][rows],
        question_mask=forward["question_mask"][rows],
        feature_keys=[{"video": "", "audio": ""}] * 2 + [{"video": ""}],
        bad=[],
        notes=[],
    )
