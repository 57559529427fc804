"""`vllm-reroute explain`: what it refuses before any engine starts, and one whole run."""

from __future__ import annotations

import pytest
from PIL import Image

from benchmarks.grounding.evaluate import MODEL
from benchmarks.grounding.questions import questions
from vllm_reroute.command_line import main
from vllm_reroute.explain.engine import parsed_engine_flags
from vllm_reroute.explain.pictures import image_of
from vllm_reroute.explain.question import Question

ENGINE = ("--dtype", "float32", "--max-model-len", "512", "--kv-cache-memory-bytes", str(2**25))


@pytest.fixture(scope="module")
def asked():
    """A question with two hops."""
    return list(questions("test", 9))[7]


@pytest.fixture
def image(asked, tmp_path):
    path = tmp_path / "scene.png"
    asked.image.save(path)
    return path


def run(capsys, words):
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def words_for(image, out, *more, question="What?", schedule=("--reroute-schedule", "pdrop")):
    return ["explain", "--model", MODEL, "--image", image, "--question", question, "--out", out,
            *schedule, *more]  # fmt: skip


@pytest.mark.parametrize(
    "change,said",
    [
        ({"schedule": ()}, r"nothing to explain: give --reroute-schedule. Example: vllm-reroute"),
        ({"schedule": ("--reroute-schedule", "none")}, r"nothing to explain"),
        ({"more": ("--max-tokens", "0")}, r"--max-tokens 0 must be 1 or more"),
        ({"more": ("--frames", "0")}, r"--frames 0 must be 1 or more"),
    ],
)
def test_mistakes_are_one_line(capsys, image, tmp_path, change, said):
    schedule = {k: v for k, v in change.items() if k == "schedule"}
    words = words_for(image, tmp_path / "out", *change.get("more", ()), **schedule)
    code, out, err = run(capsys, words)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert said in err
    assert not (tmp_path / "out").exists()


def test_picture_is_needed(capsys, tmp_path):
    words = ["explain", "--model", MODEL, "--question", "What?", "--out", tmp_path / "out"]
    code, _, err = run(capsys, [*words, "--reroute-schedule", "pdrop"])
    assert code == 2 and "give --image or --video" in err


def test_other_commands_take_no_engine_flags(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["models", "--max-model-len", "512"])
    assert stopped.value.code == 2
    assert "unrecognized arguments: --max-model-len 512" in capsys.readouterr().err


def question(*engine_flags: str) -> Question:
    picture = image_of("a.png", Image.new("RGB", (8, 8)))
    return Question(
        model=str(MODEL), text="?", pictures=(picture,), max_tokens=1, engine_flags=engine_flags
    )


def test_engine_flags_are_vllms():
    given = parsed_engine_flags(question("--max-model-len", "300", "--no-enforce-eager"))
    assert (given.model, given.max_model_len) == (str(MODEL), 300)
    assert (given.enforce_eager, given.max_num_seqs) == (False, 1)
    assert given.limit_mm_per_prompt == {"image": 1, "video": 0}


@pytest.mark.parametrize(
    "flags,said",
    [
        (("--max-model-length", "300"), "--max-model-length.*engine flags of vLLM"),
        (("--additional-config", '{"reroute": {"tier": 64}}'), "takes reroute options as flags"),
    ],
)
def test_wrong_engine_flags(flags, said):
    with pytest.raises(ValueError, match=said):
        parsed_engine_flags(question(*flags))


def test_whole_run(capsys, image, asked, tmp_path):
    """Two engines answer the question rightly, and all of it is left in the folder."""
    folder = tmp_path / "out"
    words = words_for(image, folder, "--reroute-tier", "64", *ENGINE, question=asked.text)
    code, out, err = run(capsys, words)
    assert code == 0, err
    lines = out.splitlines()
    assert f"routed  {asked.answer}" in lines and f"dense   {asked.answer}" in lines
    assert "Stage 2 · layers 7-14: 20 of 144 run, 124 deferred" in out
    assert f"page    {folder / 'index.html'}" in lines
    assert sorted(path.name for path in folder.iterdir()) == [
        "index.html", "sheet.png", *(f"stage-{index}.png" for index in range(5)),
    ]  # fmt: skip
    assert asked.text in (folder / "index.html").read_text(encoding="utf-8")
