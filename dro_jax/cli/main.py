"""The `dro_jax` command and its subcommands."""

import argparse
import dataclasses
import io
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import dro_jax
from dro_jax.errors import DivergenceError, UsageError

if TYPE_CHECKING:
    from dro_jax.cli.generate import Sampling
    from dro_jax.cli.train import Interrupted

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: everything is saved, the same command goes on.


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code.

    0 done; 1 diverged, or the system failed (a full disk); 2 bad input; 75 stopped early, all saved; 130
    interrupted where there was nothing to save.
    """
    for stream in (sys.stdin, sys.stdout):
        # Texts are UTF-8 whatever the locale of a bare container says.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="strict")
    plain, bindings = _split_gin_bindings(sys.argv[1:] if arguments is None else arguments)
    parsed = _parser().parse_args(plain)
    try:
        if parsed.command in ("train", "cache"):
            return _configured(parsed, bindings)
        if parsed.command == "plan":
            return _plan(parsed, bindings)
        if parsed.command == "paper":
            return _paper(parsed, bindings)
        if bindings:
            raise UsageError(
                f"--gin.{bindings[0]}: only `dro_jax train`, `cache`, `plan` and `paper` take gin flags"
            )
        commands = {
            "demo": _demo,
            "check": _check,
            "generate": _generate,
            "compare": _compare,
            "convert": _convert,
        }
        return commands[parsed.command](parsed)
    except (UsageError, DivergenceError) as error:
        # Gin adds lines about the call that raised it.
        print(f"dro_jax: {str(error).splitlines()[0]}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED
    except BrokenPipeError:
        # Whoever read our output has enough; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        print(f"dro_jax: {str(error).splitlines()[0]}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("dro_jax: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dro_jax",
        description="Align T5 models from plain feedback: Direct Reward Optimisation (arXiv 2405.19107).",
    )
    parser.add_argument("--version", action="version", version=f"dro_jax {dro_jax.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo", help="the whole road in minutes, on made-up data with a known optimum"
    )
    demo.add_argument(
        "--workdir",
        default="dro_jax_demo",
        help="where everything is written (default: %(default)s)",
    )

    demo.add_argument(
        "--algorithm",
        default="dro_v",
        metavar="NAME",
        help="a file of gin_configs/algorithms, such as kto, or all (default: %(default)s)",
    )

    paper = commands.add_parser(
        "paper",
        help="the paper's experiments in miniature, on data with a known optimum (hours)",
        epilog="The same command goes on where it was interrupted; other arms and seeds join those that are there. "
        "--gin.NAME=VALUE goes to every training.",
    )
    paper.add_argument(
        "--workdir",
        default="dro_jax_paper",
        help="where everything is written (default: %(default)s)",
    )
    paper.add_argument(
        "--quick", action="store_true", help="one seed and the six main arms, in 20 minutes"
    )
    paper.add_argument(
        "--arms",
        nargs="+",
        metavar="ARM",
        help="files of gin_configs/experiments/miniature, such as dro_v kto (default: all)",
    )
    paper.add_argument("--seeds", nargs="+", type=int, help="default: 0 1 2")
    paper.add_argument(
        "--jobs", type=int, help="trainings at a time (default: one a core, at most eight)"
    )

    for name, explained in (
        ("train", "train on a feedback file; the same command goes on after an interruption"),
        ("cache", "tokens and the reference's log-probabilities of a run, computed once"),
    ):
        configured = commands.add_parser(
            name,
            help=explained,
            epilog="Any setting of the gin files: --gin.NAME=VALUE, strings with quotes of their own, as in "
            "--gin.FEEDBACK_FILE=\"'my.jsonl'\" --gin.MODEL_DIR=\"'out'\" --gin.TRAIN_STEPS=1000. `cache` "
            "takes the command line of the run that it is for.",
        )
        _add_gin_files(configured)
        _add_processes(configured)

    plan = commands.add_parser(
        "plan",
        help="whether a run fits TPUs or GPUs that are not here, and how fast it can be",
        epilog="Takes the command line of the run that it is for; FEEDBACK_FILE and MODEL_DIR need not be given. "
        "Leaves with 0 where the run fits and 1 where it does not.",
    )
    _add_gin_files(plan)
    machine = plan.add_mutually_exclusive_group(required=True)
    machine.add_argument(
        "--topology", help="a TPU slice such as v5e:4x4: the step is compiled for it (minutes)"
    )
    machine.add_argument("--gpus", help="GPUs, such as 8xH100: by arithmetic alone")
    plan.add_argument("--json", action="store_true", help="all of it as JSON, on stdout")

    check = commands.add_parser(
        "check", help="what is in feedback files: rows, rewards, lengths, mistakes, and how to pack"
    )
    check.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help=".jsonl, .jsonl.gz or .parquet, a glob, or tfds:name",
    )
    check.add_argument("--vocabulary_file", help="a SentencePiece model (default: bytes)")
    check.add_argument(
        "--inputs", type=int, default=512, help="limit of prompts, tokens (default: %(default)s)"
    )
    check.add_argument(
        "--targets", type=int, default=512, help="limit of completions (default: %(default)s)"
    )
    check.add_argument(
        "--max_examples", type=int, default=16, help="examples a row (default: %(default)s)"
    )
    check.add_argument(
        "--ultrafeedback_score",
        default="fine_grained",
        help="fine_grained or overall (default: %(default)s)",
    )
    check.add_argument("--json", action="store_true", help="all of it as JSON, on stdout")

    generate = commands.add_parser(
        "generate", help="complete prompts with a trained policy, as JSONL"
    )
    generate.add_argument(
        "--checkpoint", required=True, help="MODEL_DIR of a run, or one checkpoint_<step> in it"
    )
    generate.add_argument(
        "--prompts",
        default="-",
        help="text with a prompt a line, or .jsonl with a field prompt; - is stdin (default)",
    )
    generate.add_argument("--output", default="-", help="file to write; - is stdout (default)")
    _add_sampling(generate)

    compare = commands.add_parser(
        "compare",
        help="which policy is better: side-by-side win rates by a judge, and a report",
        epilog="The same command goes on after an interruption: completions and a language model's replies are kept in "
        "--output.",
    )
    compare.add_argument(
        "policies",
        nargs="+",
        metavar="POLICY",
        help="MODEL_DIR of a run, one checkpoint_<step> in it, its reference, or a file of completions (.jsonl with "
        "fields prompt and completion); two or more",
    )
    compare.add_argument(
        "--prompts",
        required=True,
        help="text with a prompt a line, or .jsonl with a field prompt",
    )
    compare.add_argument(
        "--judge",
        required=True,
        help="llm, llm:TEMPLATE_FILE, implied_reward:RUN, value:RUN or reward:MODULE:FUNCTION",
    )
    compare.add_argument(
        "--output", required=True, help="folder for report.html, .md, .json and the completions"
    )
    compare.add_argument(
        "--reference",
        help="checkpoint that KL is measured from (default: the reference that the runs share)",
    )
    compare.add_argument("--folds", type=int, default=5, help="(default: %(default)s)")
    compare.add_argument(
        "--fold_size",
        type=int,
        default=1000,
        help="prompts a fold; fewer where there are not so many (default: %(default)s)",
    )
    _add_sampling(compare)

    convert = commands.add_parser(
        "convert",
        help="a T5 of Hugging Face or T5X to start from, or a run for transformers or T5X",
        epilog="A Hugging Face model or a T5X checkpoint becomes a folder for INIT_CHECKPOINT with a gin file; a run "
        "becomes a folder for AutoModelForSeq2SeqLM, or a T5X checkpoint with a gin file, its value network beside it. "
        "Which way follows from what --from is.",
    )
    convert.add_argument(
        "--from",
        dest="source",
        required=True,
        help="config.json with safetensors, a model on the hub such as google/flan-t5-small, or MODEL_DIR of a run or "
        "of T5X, or one checkpoint_<step> in it",
    )
    convert.add_argument("--to", dest="target", required=True, help="a folder, new or empty")
    convert.add_argument(
        "--format",
        choices=("huggingface", "t5x", "t5x_scanned"),
        help="what a run becomes; t5x_scanned is for T5X's scalable_t5 (default: huggingface)",
    )
    convert.add_argument(
        "--vocabulary_file", help="SentencePiece model of a T5X checkpoint (default: bytes)"
    )
    return parser


def _add_sampling(generate: argparse.ArgumentParser) -> None:
    generate.add_argument(
        "--max_tokens", type=int, help="longest completion (default: the run's targets length)"
    )
    generate.add_argument(
        "--temperature", type=float, help="0 is greedy (default: 1.0; 0 with --num_beams)"
    )
    generate.add_argument("--top_k", type=int, default=0, help="0 is off (default)")
    generate.add_argument("--top_p", type=float, default=1.0, help="1 is off (default)")
    generate.add_argument(
        "--num_beams", type=int, default=1, help="beams of a beam search; 1 is none (default)"
    )
    generate.add_argument(
        "--length_penalty",
        type=float,
        default=1.0,
        help="a beam's log-probability is divided by its length to this power (default: %(default)s)",
    )
    generate.add_argument(
        "--seed", type=int, default=0, help="same seed, same text (default: %(default)s)"
    )
    generate.add_argument(
        "--batch_size",
        type=int,
        default=32,
        help="prompts at a time; changes no text (default: %(default)s)",
    )
    generate.add_argument(
        "--fsdp",
        type=int,
        default=1,
        help="devices that weights and rows are spread over, as Partitioning.fsdp (default: %(default)s)",
    )
    generate.add_argument(
        "--model",
        type=int,
        default=1,
        help="devices that weights and their activations are spread over, as Partitioning.model "
        "(default: %(default)s)",
    )


def _add_processes(train: argparse.ArgumentParser) -> None:
    train.add_argument(
        "--multihost",
        action="store_true",
        help="one of several processes, started alike on every host of a TPU pod, a Slurm or an MPI job",
    )
    train.add_argument(
        "--coordinator_address", help="elsewhere: HOST:PORT of process 0, the same for all"
    )
    train.add_argument("--num_processes", type=int, help="elsewhere: how many processes there are")
    train.add_argument("--process_id", type=int, help="elsewhere: which of them this is, from 0")


def _add_gin_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gin_file",
        action="append",
        required=True,
        help="a gin file, such as runs/dro_v_tiny.gin; repeatable",
    )
    parser.add_argument(
        "--gin_search_paths",
        action="append",
        default=[],
        help="a folder to look for gin files in; repeatable",
    )


def _split_gin_bindings(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates `--gin.NAME=VALUE`, T5X's way of binding, from the flags that argparse knows."""
    plain, bindings = [], []
    for argument in arguments:
        if argument.startswith("--gin."):
            name, equals, value = argument.removeprefix("--gin.").partition("=")
            if not equals:
                print(f"dro_jax: {argument}: write --gin.NAME=VALUE", file=sys.stderr)
                raise SystemExit(EXIT_USAGE)
            bindings.append(f"{name} = {value}")
        else:
            plain.append(argument)
    return plain, bindings


# The subcommands import what they need when they run: TensorFlow alone takes seconds.


def _configured(parsed: argparse.Namespace, bindings: list[str]) -> int:
    _start_console()
    import jax
    import tensorflow as tf

    from dro_jax.cli import cache, configuration, console, train
    from dro_jax.training import processes

    apart = (parsed.coordinator_address, parsed.num_processes, parsed.process_id)
    if parsed.multihost or apart != (None, None, None):
        processes.start(*apart)
        if not processes.is_first():
            console.silence()
    processes.agree(lambda: configuration.load(parsed.gin_file, bindings, parsed.gin_search_paths))
    processes.refuse_differences("configuration", configuration.text())
    # Makes what the configuration names, and finds what is wrong with it.
    run = processes.agree(lambda: configuration.bound(train.train))
    try:
        if parsed.command == "train":
            return _finish(run())
        cache.run()
        return 0
    except (jax.errors.JaxRuntimeError, tf.errors.OpError) as error:
        print(f"dro_jax: {_explain(error)}", file=sys.stderr, flush=True)
        if jax.process_count() > 1:
            # The usual end waits for the processes that are gone.
            os._exit(EXIT_FAILED)
        return EXIT_FAILED


def _explain(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    if "No space left" in str(error):
        return f"a file cannot be written ({text}); make room, and the same command goes on"
    if "RESOURCE_EXHAUSTED" in text:
        return (
            f"a device has not enough memory ({text}); raise MICROBATCHES, set T5Config.remat = 'full', or spread "
            "the weights over more devices (Partitioning.fsdp)"
        )
    return f"the devices stopped ({text}); the same command goes on from the last checkpoint"


def _plan(parsed: argparse.Namespace, bindings: list[str]) -> int:
    _start_console(logs_to_stderr=parsed.json)
    from dro_jax.cli import configuration, plan

    given = [*plan.PLACEHOLDERS, *bindings]
    configuration.load(parsed.gin_file, given, parsed.gin_search_paths)
    fits = plan.run(topology=parsed.topology, gpus=parsed.gpus, as_json=parsed.json)
    return 0 if fits else EXIT_FAILED


def _demo(parsed: argparse.Namespace) -> int:
    _start_console()
    from dro_jax.cli import demo

    return _finish(demo.run(parsed.workdir, parsed.algorithm))


def _paper(parsed: argparse.Namespace, bindings: list[str]) -> int:
    _start_console()
    from dro_jax.cli import paper

    return _finish(
        paper.run(
            parsed.workdir,
            arms=parsed.arms,
            seeds=parsed.seeds,
            quick=parsed.quick,
            jobs=parsed.jobs,
            bindings=bindings,
        )
    )


def _start_console(*, logs_to_stderr: bool = False) -> None:
    from dro_jax.cli import console, host_memory

    host_memory.keep_freed_memory()
    console.configure_logging(to=console.error_console if logs_to_stderr else console.console)
    console.start_tensorflow()


def _finish(interrupted: "Interrupted | None") -> int:
    if interrupted is None:
        return 0
    print(
        f"dro_jax: {interrupted.signal} at step {interrupted.step}: saved; "
        "the same command goes on from there",
        file=sys.stderr,
    )
    return EXIT_INTERRUPTED


def _check(parsed: argparse.Namespace) -> int:
    _start_console(logs_to_stderr=parsed.json)
    from dro_jax.cli import check

    check.run(
        files=parsed.files,
        vocabulary_file=parsed.vocabulary_file,
        inputs=parsed.inputs,
        targets=parsed.targets,
        max_examples=parsed.max_examples,
        ultrafeedback_score=parsed.ultrafeedback_score,
        as_json=parsed.json,
    )
    return 0


def _generate(parsed: argparse.Namespace) -> int:
    # stdout is for the completions.
    _start_console(logs_to_stderr=True)
    from dro_jax.cli import generate

    generate.run(
        checkpoint=parsed.checkpoint,
        prompts=parsed.prompts,
        output=parsed.output,
        sampling=_sampling(parsed),
    )
    return 0


def _sampling(parsed: argparse.Namespace) -> "Sampling":
    from dro_jax.cli.generate import Sampling

    names = [field.name for field in dataclasses.fields(Sampling)]
    return Sampling(**{name: getattr(parsed, name) for name in names})


def _compare(parsed: argparse.Namespace) -> int:
    _start_console()
    from dro_jax.cli import compare

    compare.run(
        policies=parsed.policies,
        prompts=parsed.prompts,
        judge=parsed.judge,
        output=parsed.output,
        reference=parsed.reference,
        folds=parsed.folds,
        fold_size=parsed.fold_size,
        sampling=_sampling(parsed),
    )
    return 0


def _convert(parsed: argparse.Namespace) -> int:
    _start_console()
    from dro_jax.cli import convert

    convert.run(parsed.source, parsed.target, parsed.format, parsed.vocabulary_file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
