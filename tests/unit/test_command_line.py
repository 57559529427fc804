"""The `vllm-reroute` command: what it prints, and that a mistake is one line and exit code 2."""

import re

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from vllm_reroute.command_line import main
from vllm_reroute.families.short_names import SHORT_NAMES
from vllm_reroute.families.table import FAMILIES
from vllm_reroute.schedule import RerouteOptions
from vllm_reroute.schedule.footprint import RequestFootprint
from vllm_reroute.schedule.published import ACTIONS, SCHEDULES, TIERS

DEPTH = 16
VISUAL = 64  # 112 x 112 pixels in patches of 14
BYTES_PER_TOKEN = 2 * 4 * 32 * 2  # K and V of 4 heads of 32, 16-bit


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with nothing but a config."""
    folder = tmp_path_factory.mktemp("llava")
    text = LlamaConfig(
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=DEPTH,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=128,
    )
    vision = CLIPVisionConfig(image_size=112, patch_size=14, num_hidden_layers=2)
    LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        vision_config=vision,
        text_config=text,
        image_token_index=5,
    ).save_pretrained(folder)
    return str(folder)


def run(capsys, *words):
    code = main(words)
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


@pytest.mark.parametrize(
    "words,options",
    [
        ([], {}),
        (["--reroute-action", "remove", "--reroute-tier", "64"], {"action": "remove", "tier": 64}),
        (["--reroute-budget", "200"], {"budget": 200}),
    ],
)
def test_plan(capsys, model, words, options):
    code, out, err = run(capsys, "plan", "--model", model, "--reroute-schedule", "pdrop", *words)
    assert (code, err) == (0, [])
    schedule = RerouteOptions(schedule="pdrop", **options).resolve(DEPTH)
    shown = "\n".join(out)
    assert model in out[0]
    assert f"pdrop, action {schedule.action}" in shown
    assert f"decision layers   {', '.join(map(str, schedule.layers))} of {DEPTH}" in shown
    assert f"{schedule.average(VISUAL):.1f} per layer on average, of {VISUAL}" in shown
    table = [line.split() for line in out if re.fullmatch(r" +\d+ +\d+-\d+ .*", line)]
    assert [(int(row[0]), row[1], int(row[3])) for row in table] == [
        (i, f"{stage.first_layer}-{stage.end_layer - 1}", kept)
        for i, (stage, kept) in enumerate(
            zip(schedule.stages, schedule.kept_per_stage(VISUAL), strict=True)
        )
    ]


@pytest.mark.parametrize(
    "words,block_size,num_text", [([], 16, 104), (["--block-size", "32"], 32, 104)]
)
def test_plan_states_the_bytes(capsys, model, words, block_size, num_text):
    code, out, _ = run(capsys, "plan", "--model", model, "--reroute-schedule", "pdrop", *words)
    of_tiers = [
        RequestFootprint(
            schedule=RerouteOptions(schedule="pdrop", tier=tier).resolve(DEPTH),
            num_visual=VISUAL,
            num_text=num_text,
            bytes_per_token=BYTES_PER_TOKEN,
            block_size=block_size,
        )
        for tier in (192, 128, 64)
    ]
    numbers = [float(number) for line in out for number in re.findall(r"([\d.]+) MiB", line)]
    assert code == 0
    dense, routed = of_tiers[0].dense_bytes, [one.routed_bytes for one in of_tiers]
    # Dense and routed; then what a request may choose: each tier, and to keep everything.
    assert numbers == pytest.approx(
        [n / 2**20 for n in (dense, routed[0], *routed, dense)], abs=5e-4
    )
    assert any(
        f"{VISUAL} visual + {num_text} text tokens, blocks of {block_size}" in line for line in out
    )


def test_plan_of_a_longer_request(capsys, model):
    words = [
        "plan",
        "--model",
        model,
        "--reroute-layers",
        "2,8",
        "--reroute-keep",
        ".5,.25",
        "--text-tokens",
    ]
    assert "64 visual + 10 text" in "\n".join(run(capsys, *words, "10")[1])
    assert "64 visual + 999 text" in "\n".join(run(capsys, *words, "999")[1])


@pytest.mark.parametrize(
    "words,shown",
    [
        ([], "give --reroute-schedule"),
        (["--reroute-schedule", "none"], "give --reroute-schedule"),
        (["--reroute-tier", "64"], "--reroute-tier 64 needs a schedule"),
        (
            ["--reroute-schedule", "pdrop", "--reroute-tier", "64", "--reroute-budget", "90"],
            "exclude each other",
        ),
        (
            ["--reroute-schedule", "pdrop", "--reroute-budget", "3"],
            "--reroute-budget 3 cannot be met",
        ),
        (["--reroute-layers", "2,16", "--reroute-keep", ".5,.5"], "must stay below the model's 16"),
        (["--reroute-layers", "4,2", "--reroute-keep", ".5,.5"], "strictly increasing"),
        (["--reroute-layers", "2", "--reroute-keep", "1.5"], "(0, 1]"),
        (["--reroute-layers", "2"], "belong together"),
    ],
)
def test_a_mistake_is_one_line(capsys, model, words, shown):
    code, out, err = run(capsys, "plan", "--model", model, *words)
    assert (code, out, len(err)) == (2, [], 1)
    assert err[0].startswith("vllm-reroute: ") and shown in err[0]


def test_a_model_that_cannot_be_routed(capsys, tmp_path):
    LlamaConfig(num_hidden_layers=32, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    code, out, err = run(capsys, "plan", "--model", str(tmp_path), "--reroute-schedule", "pdrop")
    assert (code, out, len(err)) == (2, [], 1)
    assert "'LlamaForCausalLM'" in err[0] and "Supported: LlavaForConditionalGeneration" in err[0]


def test_a_model_that_is_not_there(capsys, tmp_path):
    code, out, err = run(
        capsys, "plan", "--model", str(tmp_path / "none"), "--reroute-schedule", "pdrop"
    )
    assert (code, out) == (2, [])
    assert err[0].startswith("vllm-reroute: ") and "none" in err[0]
    assert not any("Traceback" in line for line in err)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "plan",
        "plan --model m --reroute-schedule x",
        "plan --model m --block-size 0",
        "plan --model m --text-tokens -1",
        "nothing",
    ],
)
def test_argparse_exits_with_2(capsys, words):
    with pytest.raises(SystemExit) as exited:
        main(words.split())
    assert exited.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_help_shows_every_flag(capsys):
    with pytest.raises(SystemExit) as exited:
        main(["plan", "--help"])
    assert exited.value.code == 0
    shown = capsys.readouterr().out
    for flag in (
        "--model",
        "--block-size",
        "--text-tokens",
        "--reroute-schedule",
        "--reroute-keep",
        "example:",
    ):
        assert flag in shown


def test_schedules_lists_what_there_is(capsys):
    code, out, err = run(capsys, "schedules")
    assert (code, err) == (0, [])
    rows = {
        tuple(line.split()[:3]): line
        for line in out
        if line.split()[:1] and line.split()[0] in SCHEDULES
    }
    assert len(rows) == len(SCHEDULES) * len(ACTIONS) * len(TIERS)
    for (name, action, tier), line in rows.items():
        schedule = RerouteOptions(schedule=name, action=action, tier=int(tier)).resolve(32)
        assert line.split()[3] == ",".join(map(str, schedule.layers))
        assert line.split()[4] == ",".join(f"{ratio:g}" for ratio in schedule.keep)
        assert float(line.split()[5]) == pytest.approx(schedule.average(), abs=0.051)


def test_models_lists_every_family(capsys):
    code, out, err = run(capsys, "models")
    assert (code, err) == (0, [])
    shown = "\n".join(out)
    for family in FAMILIES:
        assert f"{family.title}: {family.architecture}" in shown
        assert f"tested: {family.tested}" in shown
    rows = {tuple(line.split()) for line in out}
    assert set(SHORT_NAMES.items()) <= rows
