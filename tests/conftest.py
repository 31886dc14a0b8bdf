import copy
import os
import threading
from pathlib import Path

import pytest

# Threads wait for each other longer than a tiny model's matrices take: 10 × slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real rows that are not ours to bundle; tests skip without it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the development data set beside the repository")
    return folder


@pytest.fixture
def serve(monkeypatch):
    """Start a `chat_server.Server` that says `say(body, count)`."""
    from chat_server import Server

    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    servers = []

    def start(say):
        servers.append(Server(say))
        threading.Thread(
            target=servers[-1].serve_forever, args=(0.01,), daemon=True
        ).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


# --- the random two-layer model; heavy imports wait until a test asks for it


@pytest.fixture
def fp32(monkeypatch) -> None:
    """Compute in float32 whatever the machine is fast in: comparisons are tight."""
    monkeypatch.setenv("STARLING_PRECISION", "fp32")


@pytest.fixture(scope="session")
def tokenizer():
    from starling_lib.models import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture
def policy():
    from starling_lib.models import tiny_model

    return tiny_model()


@pytest.fixture(scope="session")
def _reward_model(tokenizer):
    from starling_lib.models import NEW_HEAD_SCALE, load_reward_model

    model = load_reward_model("tiny", tokenizer)
    # Scores of order 1, so that the tolerances of the tests mean something.
    model.score.weight.data /= NEW_HEAD_SCALE
    return model


@pytest.fixture
def reward_model(_reward_model):
    """A fresh copy: training one test's model must not reach another's."""
    return copy.deepcopy(_reward_model)


def toy_rows() -> list[dict]:
    """Ten prompts, four responses of unequal length each: the more a's, the better."""
    tails = ["aaaaaa", "aaa", "abbbb", "bb"]
    return [
        {
            "prompt": [{"role": "user", "content": f"{'x' * (i % 4)} say {i}"}],
            "responses": [f"{i}{tail}" for tail in tails],
            "finished": [True, i % 2 == 0, True, True],
        }
        for i in range(10)
    ]


@pytest.fixture(scope="session")
def toy_rankings():
    from datasets import Dataset

    return Dataset.from_list(toy_rows())


def mistral(kind=None, sliding_window=None, **changes):
    """A small random model of an architecture with sliding windows."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_hidden_layers": 3, "vocab_size": 64}
    config = MistralConfig(**sizes, sliding_window=sliding_window, **changes)
    return (kind or MistralForCausalLM)(config).eval()
