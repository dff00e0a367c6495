"""Commands of ms-swift's own pages become configurations that the trainer takes."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from trainer import cli, config
from trainer.errors import ConfigError
from trainer.swift import TABLES, import_command

# README of ms-swift 4.6. Where it ends a command with "...", the words behind [] are ours.
SELF_COGNITION = """
CUDA_VISIBLE_DEVICES=0 swift sft --model Qwen/Qwen3-4B-Instruct-2507 --tuner_type lora
    --dataset 'AI-ModelScope/alpaca-gpt4-data-zh#500' 'AI-ModelScope/alpaca-gpt4-data-en#500'
              'swift/self-cognition#500'
    --torch_dtype bfloat16 --num_train_epochs 1 --per_device_train_batch_size 1 --per_device_eval_batch_size 1
    --learning_rate 1e-4 --lora_rank 8 --lora_alpha 32 --target_modules all-linear --gradient_accumulation_steps 16
    --eval_steps 50 --save_steps 50 --save_total_limit 2 --logging_steps 5 --max_length 2048 --output_dir output
    --warmup_ratio 0.05 --dataloader_num_workers 4 --model_author swift --model_name swift-robot
"""
FINE_TUNING = """
CUDA_VISIBLE_DEVICES=0 swift sft --model Qwen/Qwen3-4B-Instruct-2507 --dataset AI-ModelScope/alpaca-gpt4-data-en
    --tuner_type lora --output_dir output
"""
DPO = """
CUDA_VISIBLE_DEVICES=0 swift rlhf --rlhf_type dpo --model Qwen/Qwen3-4B-Instruct-2507
    --dataset hjh0119/shareAI-Llama3-DPO-zh-en-emoji --tuner_type lora --output_dir output
"""
GRPO = """
CUDA_VISIBLE_DEVICES=0,1,2,3 NPROC_PER_NODE=4 swift rlhf --rlhf_type grpo --model Qwen/Qwen3-4B-Instruct-2507
    --tuner_type lora --use_vllm true --vllm_mode colocate --dataset AI-MO/NuminaMath-TIR#10000 --output_dir output
    --reward_funcs accuracy
"""


def imported(command: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(import_command(shlex.split(command)))
    return found


@pytest.mark.parametrize("command", [SELF_COGNITION, FINE_TUNING, DPO, GRPO], ids=["quick start", "sft", "dpo", "grpo"])
def test_the_commands_of_its_readme_can_be_run(command: str, tmp_path: Path) -> None:
    printed = CliRunner().invoke(cli.train, ["import-swift", *shlex.split(command)])
    assert printed.exit_code == 0, printed.output
    file = tmp_path / "train.yaml"
    file.write_text(printed.output)
    method = yaml.safe_load(printed.output)["method"]
    shown = CliRunner().invoke(cli.train, [method, "--config", str(file), "--print-config"])
    assert shown.exit_code == 0, shown.output


def test_the_quick_start_in_full() -> None:
    assert imported(SELF_COGNITION) == {
        "method": "sft",
        "model": "Qwen/Qwen3-4B-Instruct-2507",
        "dtype": "bfloat16",
        "gradient_checkpointing": True,
        "lora_rank": 8,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "lora_target": ["all-linear"],
        "dataset": [
            "AI-ModelScope/alpaca-gpt4-data-zh#500",
            "AI-ModelScope/alpaca-gpt4-data-en#500",
            "swift/self-cognition#500",
        ],
        "max_length": 2048,
        "epochs": 1,
        "batch_size": 16,
        "learning_rate": 1e-4,
        "warmup_ratio": 0.05,
        "weight_decay": 0.1,
        "output_dir": "output",
        "seed": 42,
        "save_every": 50,
        "keep_checkpoints": 2,
    }
    comments = import_command(shlex.split(SELF_COGNITION)).partition("method:")[0]
    for name in ("eval_steps: there is no val_dataset", "logging_steps:", "model_author:", "dataset #500: the first"):
        assert name in comments


def test_what_is_not_given_is_its_default_not_ours() -> None:
    values = imported(FINE_TUNING)
    assert (values["epochs"], values["lora_rank"], values["save_every"], values["batch_size"]) == (3, 8, 500, 16)
    assert imported(DPO)["beta"] == 0.1 and imported(GRPO)["beta"] == 0.04
    assert imported(f"{FINE_TUNING} --tuner_type full")["learning_rate"] == 1e-5
    assert imported("sft --model a/b --dataset d.jsonl")["output_dir"] == "output/b"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--train_type full --torch_dtype bfloat16", {"tuning": "full", "dtype": "float32"}),
        ("--target_modules q_proj v_proj", {"lora_target": ["q_proj", "v_proj"]}),
        ("--target_regex .*q_proj$", {"lora_target": [".*q_proj$"]}),
        ("--per-device-train-batch-size=4 --max_length 512", {"batch_size": 16, "micro_batch_tokens": 2048}),
        ("--val_dataset e.jsonl --eval_steps 20 --early_stop_interval 3", {"eval_every": 20, "early_stopping": 3}),
        ("--system 'You are terse.'", {"system": "You are terse."}),
        ("--loss_scale last_round --truncation_strategy right", {"train_on": "last", "overlong": "truncate"}),
        ("--lr_scheduler_type linear --max_steps 7", {"schedule": "linear", "max_steps": 7}),
        ("--report_to wandb tensorboard", {"report_to": ["wandb", "tensorboard"]}),
        ("--use_rslora --gradient_checkpointing false", {"lora_rs": True, "gradient_checkpointing": False}),
        ("--dataset org/set:en#9", {"dataset": ["org/set:en:train#9"]}),
    ],
)
def test_an_argument_finds_its_key(arguments: str, expected: dict[str, Any]) -> None:
    values = imported(f"swift sft --model m --dataset d.jsonl {arguments}")
    assert expected.items() <= values.items()


@pytest.mark.parametrize(
    ("method", "arguments", "expected"),
    [
        ("dpo", "--beta 0.3 --label_smoothing 0.1", {"beta": 0.3, "label_smoothing": 0.1}),
        ("simpo", "--simpo_gamma 0.5", {"beta": 2.0, "gamma": 0.5}),
        ("kto", "--desirable_weight 0.7", {"beta": 0.1, "desirable_weight": 0.7}),
        ("orpo", "", {"beta": 0.1}),
        (
            "grpo",
            "--reward_funcs accuracy format --reward_weights 1 0.5 --num_generations 4 --epsilon_high 0.28 "
            "--per_device_train_batch_size 8 --gradient_accumulation_steps 2 --max_completion_length 100 "
            "--max_length 400 --loss_type dr_grpo --scale_rewards none",
            {
                "reward": ["accuracy", "format"],
                "reward_weight": [1.0, 0.5],
                "group_size": 4,
                "batch_size": 4,
                "clip_high": 0.28,
                "max_length": 500,
                "loss_type": "dr_grpo",
                "scale_rewards": False,
            },
        ),
    ],
)
def test_an_argument_of_rlhf_finds_its_key(method: str, arguments: str, expected: dict[str, Any]) -> None:
    values = imported(f"NPROC_PER_NODE=1 swift rlhf --rlhf_type {method} --model m --dataset d.jsonl {arguments}")
    assert values["method"] == method and expected.items() <= values.items()


def test_several_processes_share_the_batch_as_there() -> None:
    command = "swift sft --model m --dataset d.jsonl --per_device_train_batch_size 2 --gradient_accumulation_steps 3"
    values = imported(f"NPROC_PER_NODE=4 {command} --deepspeed zero2")
    assert (values["batch_size"], values["parallel"]) == (24, "ddp")
    assert imported(f"NPROC_PER_NODE=4 {command} --deepspeed zero3")["parallel"] == "fsdp"
    assert "parallel" not in imported(f"{command} --deepspeed zero3")


def test_what_has_no_counterpart_is_named_unless_it_is_off() -> None:
    command = "swift sft --model m --dataset d.jsonl --split_dataset_ratio 0.1 --neftune_noise_alpha 5 --use_dora true"
    comments = import_command(shlex.split(command)).partition("# Not the same")[0]
    assert "# Not taken over:" in comments
    for name in ("split_dataset_ratio", "neftune_noise_alpha", "use_dora"):
        assert f"#   {name}: {TABLES['missing'][name]}" in comments
    off = import_command(shlex.split("sft --model m --dataset d.jsonl --use_dora false --temperature 1.0 --top_k -1"))
    assert "Not taken over" not in off


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("sft --model m --dataset d --lora_ranc 8 --zzz 1", "`--lora_ranc` .* did you mean `--lora_rank`"),
        ("infer --model m", "only `swift sft` and `swift rlhf`"),
        ("sft --tuner_type adalora --model m", "only LoRA and full"),
        ("rlhf --rlhf_type ppo --model m", "ppo has no counterpart"),
        ("sft --model m", "`dataset` is needed"),
        ("rlhf --rlhf_type dpo --tuner_type full --model m --dataset d", "`tuning`"),
        ("sft missing.yaml", "cannot read missing.yaml"),
        ("sft --model m --dataset d --per_device_train_batch_size $(nproc)", "must be a number, given '\\$"),
        ("NPROC_PER_NODE=$n swift sft --model m", "NPROC_PER_NODE must be a number"),
        ("NPROC_PER_NODE=0 swift sft --model m --dataset d", "NPROC_PER_NODE must be a number from 1"),
        ("rlhf --rlhf_type grpo --model m --dataset d --reward_funcs format --reward_weights x", "reward_weight"),
    ],
)
def test_what_cannot_be_taken_is_refused(command: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        import_command(command.split())


def test_its_own_yaml_file_is_read_under_the_flags(tmp_path: Path) -> None:
    file = tmp_path / "args.yaml"
    file.write_text("model: m\ndataset: [a.jsonl, b.jsonl]\nlora_rank: 4\nENV: {MAX_PIXELS: '1'}\n")
    values = imported(f"swift sft {file} --lora_rank 32")
    assert (values["lora_rank"], values["dataset"]) == (32, ["a.jsonl", "b.jsonl"])


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "args").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read"):
        import_command(["sft", str(tmp_path / "args")])


def test_the_tables_agree_with_the_configuration() -> None:
    keys = {key for schema in config.CONFIGS.values() for key in schema.model_fields}
    assert {*TABLES["same"].values(), *filter(None, TABLES["computed"].values())} <= keys
    names = [name for table in ("same", "computed", "unneeded", "missing") for name in TABLES[table]]
    assert len(names) == len(set(names))
    assert set(TABLES["harmless"]) <= set(TABLES["missing"])
    assert set(TABLES["defaults"]) <= {*TABLES["same"], *TABLES["computed"]}
