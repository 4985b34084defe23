"""The command: what a user sees of it, errors included."""

import os
import subprocess
import sys

import pytest

from step_kernels.generate import BUNDLED, main

GOLDEN_TEXT = "ro]\ufffd\ufffd\ufffd%)4\ufffd% and\ufffd picturedoteen\x02\ufffd\ufffd read cropsAt[\ufffd and"


def test_bundled_model_says_its_golden_text(capsys):
    assert main(["--device", "cpu", "--max-new-tokens", "24"]) == 0
    assert capsys.readouterr().out == GOLDEN_TEXT + "\n"


def test_image_changes_the_answer_and_drafts_do_not(capsys):
    main(["--device", "cpu", "--image", "bundled", "--max-new-tokens", "24"])
    seen = capsys.readouterr().out
    assert seen != GOLDEN_TEXT + "\n"
    main(["--device", "cpu", "--image", "bundled", "--max-new-tokens", "24", "--mtp"])
    assert capsys.readouterr().out == seen


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
