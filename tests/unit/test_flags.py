"""The command line: flags in their own group, and how they reach an engine's configuration."""

import dataclasses
import json
import pickle

import huggingface_hub
import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.cli.serve import make_arg_parser
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_reroute.plugin import register
from vllm_reroute.schedule import (
    CONFIG_KEY,
    SCHEDULE_KEY,
    RerouteOptions,
    RoutingSchedule,
    is_routed,
)
from vllm_reroute.startup.flags import options_from_flags

FLAGS = [
    "schedule",
    "action",
    "variant",
    "tier",
    "budget",
    "layers",
    "keep",
    "scorer",
    "file",
    "history",
    "turn_marker",
]
SHORT, FULL = "llava-1.5", "llava-hf/llava-1.5-7b-hf"


@pytest.fixture(scope="module", autouse=True)
def plugin():
    register()


@pytest.fixture
def parser():
    """That of `vllm serve`."""
    return make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))


@pytest.fixture
def hub(monkeypatch):
    """Lets engine arguments name a model of the hub: offline, vLLM looks for its files at once."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def parse(*words, kind=EngineArgs):
    return kind.add_cli_args(FlexibleArgumentParser()).parse_args([str(word) for word in words])


def test_the_flags_are_a_group_of_their_own(parser):
    (group,) = [group for group in parser._action_groups if group.title == "Reroute"]
    options = [option for action in group._group_actions for option in action.option_strings]
    assert options == [f"--reroute-{name.replace('_', '-')}" for name in FLAGS]
    assert [field.name for field in dataclasses.fields(RerouteOptions)] == FLAGS


@pytest.mark.parametrize("keyword", ["all", "reroute"])
def test_the_flags_are_in_the_help(parser, keyword, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args([f"--help={keyword}"])
    shown = capsys.readouterr().out
    assert all(f"--reroute-{name.replace('_', '-')}" in shown for name in FLAGS)
    assert "{fastv,pdrop,nuwa,none}" in shown and "{192,128,64}" in shown
    assert "{rerank,keep,recall}" in shown


@pytest.mark.parametrize(
    "words,options",
    [
        ("", {}),
        ("--reroute-schedule pdrop", {"schedule": "pdrop"}),
        ("--reroute-schedule=none", {"schedule": "none"}),
        (
            "--reroute-schedule pdrop --reroute-history keep --reroute-turn-marker Bot:",
            {"schedule": "pdrop", "history": "keep", "turn_marker": "Bot:"},
        ),
        (
            "--reroute-schedule pdrop --reroute-history recall",
            {"schedule": "pdrop", "history": "recall"},
        ),
        (
            "--reroute-schedule fastv --reroute-action remove --reroute-tier 64",
            {"schedule": "fastv", "action": "remove", "tier": 64},
        ),
        ("--reroute-schedule fastv --reroute-budget 90.5", {"schedule": "fastv", "budget": 90.5}),
        ("--reroute-layers 2,7 --reroute-keep .45,.2", {"layers": "2,7", "keep": ".45,.2"}),
        ("--reroute_layers 2,7 --reroute_keep .45,.2", {"layers": "2,7", "keep": ".45,.2"}),
    ],
)
@pytest.mark.parametrize("kind", [EngineArgs, AsyncEngineArgs])
def test_flags_become_options(words, options, kind, model_folder):
    args = parse("--model", model_folder, *words.split(), kind=kind)
    assert options_from_flags(args) == {}, "children read the arguments without this plugin"
    made = kind.from_cli_args(args)
    assert type(made) is kind
    assert made.additional_config.get(CONFIG_KEY, {}) == options
    assert (CONFIG_KEY in made.additional_config) is bool(options)


@pytest.mark.parametrize(
    "words,shown",
    [
        ("--reroute-schedule fastvv", "fastvv"),
        ("--reroute-tier 100", "100"),
        ("--reroute-action drop", "drop"),
        ("--reroute-budget much", "much"),
    ],
)
def test_argparse_refuses_what_it_can(parser, words, shown, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args(words.split())
    assert shown in capsys.readouterr().err


def test_other_additional_config_is_kept(model_folder):
    other = json.dumps({"other": {"a": 1}})
    args = parse(
        "--model", model_folder, "--additional-config", other, "--reroute-schedule", "pdrop"
    )
    made = EngineArgs.from_cli_args(args)
    assert made.additional_config == {"other": {"a": 1}, CONFIG_KEY: {"schedule": "pdrop"}}


def test_options_given_twice_are_refused(model_folder, capsys):
    again = json.dumps({CONFIG_KEY: {"schedule": "fastv"}})
    with pytest.raises(SystemExit):
        parse("--model", model_folder, "--additional-config", again, "--reroute-tier", "64")
    shown = " ".join(capsys.readouterr().err.split())
    words = ["--reroute-tier", "--additional-config", "exclude each other", "one way"]
    assert [word for word in words if word not in shown] == []


def test_spawned_processes_read_the_options_without_the_plugin(parser, model_folder):
    """They unpickle the parsed arguments before plugins are loaded."""
    args = parser.parse_args([str(model_folder), "--reroute-schedule", "pdrop"])
    pickled = pickle.dumps(args)
    assert b"vllm_reroute" not in pickled
    assert pickle.loads(pickled).additional_config == {CONFIG_KEY: {"schedule": "pdrop"}}


@pytest.mark.parametrize(
    "model,served,expect_model,expect_served",
    [
        (SHORT, [], FULL, [SHORT, FULL]),
        (
            "llava-1.5-13b",
            [],
            "llava-hf/llava-1.5-13b-hf",
            ["llava-1.5-13b", "llava-hf/llava-1.5-13b-hf"],
        ),
        (SHORT, ["--served-model-name", "mine"], FULL, ["mine"]),
        (FULL, [], FULL, None),
        ("some/model", [], "some/model", None),
    ],
)
def test_a_short_name_is_served_beside_the_full_one(
    hub, model, served, expect_model, expect_served
):
    args = parse("--model", model, "--reroute-schedule", "pdrop", *served)
    made = EngineArgs.from_cli_args(args)
    assert (args.model, args.served_model_name) == (expect_model, expect_served), (
        "what the API server reads"
    )
    assert (made.model, made.served_model_name) == (expect_model, expect_served)


def test_a_local_folder_wins(tmp_path, monkeypatch):
    (tmp_path / SHORT).mkdir()
    monkeypatch.chdir(tmp_path)
    made = EngineArgs.from_cli_args(parse("--model", SHORT, "--reroute-schedule", "pdrop"))
    assert (made.model, made.served_model_name) == (SHORT, None)


def test_without_flags_nothing_is_touched(hub):
    args = parse("--model", SHORT)
    made = EngineArgs.from_cli_args(args)
    assert (made.model, made.served_model_name) == (SHORT, None)
    assert CONFIG_KEY not in made.additional_config


def test_without_options_the_engine_s_config_is_stock_vllm_s(model_folder):
    arguments = {
        "model": str(model_folder),
        "max_model_len": 512,
        "additional_config": {"other": 1},
    }
    hooked = EngineArgs(**arguments).create_engine_config()
    stock = EngineArgs.create_engine_config.__wrapped__(EngineArgs(**arguments))
    for field in dataclasses.fields(VllmConfig):
        if field.name != "instance_id":
            assert repr(getattr(hooked, field.name)) == repr(getattr(stock, field.name)), field.name
    assert hooked.compute_hash() == stock.compute_hash()
    assert not is_routed(hooked)


@pytest.mark.parametrize("options", [{"schedule": "none"}, {}, {"schedule": None}])
def test_none_is_stock_vllm(model_folder, options):
    arguments = {"model": str(model_folder), "max_model_len": 512}
    none = EngineArgs(
        **arguments, additional_config={"other": 1, CONFIG_KEY: options}
    ).create_engine_config()
    stock = EngineArgs(**arguments, additional_config={"other": 1}).create_engine_config()
    assert none.additional_config == {"other": 1}
    assert none.compute_hash() == stock.compute_hash()
    assert (
        none.model_config.architectures
        == stock.model_config.architectures
        == ["LlavaForConditionalGeneration"]
    )


def test_flags_reach_the_engine_s_config(model_folder):
    words = ["--max-model-len", "512", "--reroute-schedule", "pdrop", "--reroute-tier", "64"]
    made = EngineArgs.from_cli_args(
        parse("--model", model_folder, *words, "--additional-config", '{"other": 1}')
    )
    before = dict(vars(made))
    config = made.create_engine_config()
    options = RerouteOptions(schedule="pdrop", tier=64)
    schedule = options.resolve(8)
    assert RoutingSchedule.of(config) == schedule and is_routed(config)
    assert config.additional_config == {
        "other": 1,
        CONFIG_KEY: options.to_mapping(),
        SCHEDULE_KEY: schedule.to_dict(),
    }
    assert RerouteOptions.from_mapping(config.additional_config[CONFIG_KEY]) == options
    assert config.model_config.architectures == ["RerouteLlavaForConditionalGeneration"]
    assert (
        config.scheduler_config.get_scheduler_cls().__module__ == "vllm_reroute.kv_cache.scheduler"
    )
    asked = ["hf_overrides", "scheduler_cls", "compilation_config", "additional_config"]
    assert all(vars(made)[name] is before[name] for name in asked), "arguments may be used again"
    assert made.create_engine_config().additional_config == config.additional_config


@pytest.mark.skipif(
    not current_platform.is_cpu(), reason="elsewhere the attention backend is asked, by the worker"
)
@pytest.mark.parametrize("block_size", [None, 64])
def test_an_unset_block_size_is_the_smallest(model_folder, block_size):
    arguments = {"model": str(model_folder), "max_model_len": 512, "block_size": block_size}
    routed = EngineArgs(
        **arguments, additional_config={CONFIG_KEY: {"schedule": "fastv"}}
    ).create_engine_config()
    stock = EngineArgs(**arguments).create_engine_config()
    assert routed.cache_config.block_size == (block_size or 32)
    assert stock.cache_config.user_specified_block_size == (block_size is not None)
    assert block_size is None or stock.cache_config.block_size == block_size


def test_schedules_differ_in_the_compile_hash(model_folder):
    """Compiled stages are cached by it: another schedule must not find them."""
    hashes = set()
    for options in (
        {"schedule": "fastv"},
        {"schedule": "pdrop"},
        {"schedule": "pdrop", "tier": 64},
    ):
        arguments = {
            "model": str(model_folder),
            "max_model_len": 512,
            "additional_config": {CONFIG_KEY: options},
        }
        hashes.add(EngineArgs(**arguments).create_engine_config().compute_hash())
    assert len(hashes) == 3


def test_a_wrong_combination_stops_before_vllm_reads_the_model(hub):
    options = {"schedule": "pdrop", "tier": 64, "budget": 100}
    with pytest.raises(ValueError, match="exclude each other"):
        EngineArgs(
            model="no/such-model", additional_config={CONFIG_KEY: options}
        ).create_engine_config()
