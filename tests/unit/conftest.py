"""Fixtures shared by the unit tests. vLLM is imported by those that need it: it takes a while."""

import pytest


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A folder vLLM can make a config of: LLaVA-1.5, 8 layers, 16 visual tokens an image."""
    from .parts import save_model_folder

    return save_model_folder(tmp_path_factory.mktemp("models") / "tiny-llava")


@pytest.fixture(scope="session")
def engine_config(model_folder):
    """vLLM's config of `model_folder`, made from engine arguments as the engine makes it."""
    from vllm.engine.arg_utils import EngineArgs

    def make(**arguments):
        arguments = {
            "max_model_len": 1024,
            "max_num_batched_tokens": 1024,
            "max_num_seqs": 16,
            **arguments,
        }
        return EngineArgs(model=str(model_folder), **arguments).create_engine_config()

    return make


@pytest.fixture(scope="module")
def routed_model(engine_config, tmp_path_factory):
    """Makes a routed model's decoder from reroute options and engine arguments, without an engine."""
    from .routed_model import RoutedModel, one_process

    def make(options, **arguments):
        arguments = {
            "max_model_len": 512,
            "max_num_batched_tokens": 512,
            "dtype": "float32",
            "enforce_eager": True,
            "additional_config": {"reroute": options},
            **arguments,
        }
        return RoutedModel(engine_config(**arguments))

    with one_process(tmp_path_factory.mktemp("groups")):
        yield make
