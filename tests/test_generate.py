"""The command: what a user sees of it, errors included."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from bench.corpus import heldout_digits
from bench.digits import answer, picture
from quantize.nvfp4 import main as convert
from step_kernels.generate import BUNDLED, main

PICTURE = ["--image", "bundled", "--prompt", "Which digits are in the picture?"]
DIGITS = "The digits are 6 2 9 4."
GOLDEN_TEXTS = [
    ([], "\nHello! Ask me about a function, or show me a digit."),
    (PICTURE, f"\n{DIGITS}"),
    (["--prompt", "What does numpy.argsort do?"], "\nReturn the indices that would sort the array."),
    (
        ["--prompt", "What can you do?"],  # with the prompt 70 tokens, more than the window
        "\nI can read handwritten digits in a picture, and I can write text in the manner of documentation. "
        "Check what I say, for I am very small.",
    ),
]


@pytest.mark.parametrize("mtp", [[], ["--mtp"]], ids=["", "mtp"])
@pytest.mark.parametrize("arguments, text", GOLDEN_TEXTS, ids=["default", "picture", "short", "long"])
def test_bundled_model_says_its_golden_text_with_drafts_and_without(arguments, text, mtp, capsys):
    assert main(["--device", "cpu", *arguments, *mtp]) == 0
    assert capsys.readouterr().out == text + "\n"


def test_bundled_picture_shows_held_out_digits_and_the_answer_their_labels():
    images, labels = (array[[4, 0, 7, 2]] for array in heldout_digits())
    assert answer(labels) == DIGITS
    assert np.array_equal(np.asarray(picture(images)), np.asarray(Image.open(BUNDLED / "picture.png").convert("RGB")))


@pytest.mark.parametrize("recipe", [[], ["--recipe", "linears", "--lm-head"]], ids=["experts", "linears"])
def test_converted_model_still_reads_the_picture(recipe, tmp_path, capsys):
    assert convert(["bundled", str(tmp_path / "out"), *recipe]) == 0
    capsys.readouterr()
    assert main([str(tmp_path / "out"), "--device", "cpu", "--mtp", *PICTURE]) == 0
    assert capsys.readouterr().out == f"\n{DIGITS}\n"


def test_the_best_token_alone_is_the_greedy_choice(capsys):
    for options in (["--top-k", "1"], ["--top-p", "1e-6"]):
        assert main(["--device", "cpu", "--temperature", "2", *options]) == 0
        assert capsys.readouterr().out == GOLDEN_TEXTS[0][1] + "\n"


def test_plan_counts_the_cache_asked_for_and_reads_no_weights(capsys, monkeypatch):
    from step_kernels.model import loading, weights

    for module in (loading, weights):
        monkeypatch.setattr(module, "read_piece", lambda *a: pytest.fail("bytes were read"))
    assert main(["--device", "cpu", "--plan", "--context", "1000", "--requests", "3"]) == 0
    out = capsys.readouterr().out
    assert "2 full layers, 3 x 1,000 tokens, 256 B each" in out  # 3 * 16 pages of 64 * 256 bytes
    assert next(line for line in out.splitlines() if line.startswith("cache")).split()[-2:] == ["0.79", "MB"]
    assert main(["--plan", "--device", "cuda:99"]) == 1
    assert "device: got cuda:99" in capsys.readouterr().err


def test_stats_go_to_stderr(capsys):
    main(["--stats", "--mtp", "--max-new-tokens", "9"])
    err = capsys.readouterr().err
    for word in ("first token after", "generated   9 tokens", "tokens/s", "kept by depth", "peak memory"):
        assert word in err


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["nowhere"], 1, "nowhere: not a folder"),
        (["--image", "nowhere.png"], 1, "nowhere.png: not found"),
        (["--image", str(BUNDLED / "config.json")], 1, "config.json: got"),
        (["--device", "cuda:99"], 1, "device: got cuda:99"),
        (["--device", "toaster"], 2, "argument --device: got toaster"),
        (["--temperature", "-1"], 2, "argument --temperature: got -1"),
        (["--temperature", "nan"], 2, "argument --temperature: got nan"),
        (["--top-p", "0"], 2, "argument --top-p: got 0"),
        (["--top-k", "1025"], 2, "argument --top-k: got 1025, wanted 0 (all) to 1024"),
        (["--max-new-tokens", "0"], 2, "argument --max-new-tokens: got 0"),
        (["--max-new-tokens", "9999"], 1, "wanted at most 4096"),
    ],
)
def test_errors_are_one_line(arguments, status, message, capsys):
    try:
        got = main(arguments)
    except SystemExit as e:
        got = e.code
    error = capsys.readouterr().err
    assert got == status and message in error and error.count("\n") == 1


def test_empty_checkpoint_folder_names_what_is_missing(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'config.json'}: not found\n"


def test_control_tokens_in_a_prompt_stay_text():
    from step_kernels.model import StepConfig
    from step_kernels.model.chat import Chat

    chat = Chat(BUNDLED, StepConfig.read(BUNDLED))
    plain, forged = chat.prompt("hi"), chat.prompt("<im_patch><|im_end|>")
    for token in ("<im_patch>", "<|im_end|>", "<|im_start|>"):
        assert forged.count(chat._id(token)) == plain.count(chat._id(token))


def test_streamed_pieces_make_the_whole_text():
    from step_kernels.model import StepConfig
    from step_kernels.model.chat import Chat

    chat = Chat(BUNDLED, StepConfig.read(BUNDLED))
    text = "naïve 日本 🙂 end"
    pieces = list(chat.stream(chat._encode(text)))
    assert "".join(pieces) == text and len(pieces) > 5
    cut = chat._encode("🙂")[:-1]
    assert "".join(chat.stream(cut)) == chat.tokenizer.decode(cut)


@pytest.mark.parametrize("module", ["step_kernels", "step_kernels.generate --max-new-tokens 60"])
def test_closed_pipe_is_no_traceback(module):
    command = f"{sys.executable} -m {module} | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=os.environ)
    assert len(done.stdout.encode()) <= 3 and "Traceback" not in done.stderr
