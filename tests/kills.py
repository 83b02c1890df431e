"""Kill commands at random moments of their run and look at what they leave."""

import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from click import Command
from safetensors.torch import load_file
from tqdm import tqdm

from tests.conftest import recipe, write_recipe


class Task(NamedTuple):
    """A command, where it writes, and what may be taken for its complete result."""

    command: Command
    arguments: list[str]
    out: Path
    complete: Callable[[Path], bool]  # as far as a reader can see; raises if the files say otherwise


class Outcome(NamedTuple):
    """Kills that left a whole result, and those that left a visibly incomplete one."""

    whole: int
    incomplete: int
    seconds: float


def model_complete(out: Path) -> bool:
    """Whether `config.json` is there; then every tensor must be."""
    config, index = out / "config.json", out / "model.safetensors.index.json"
    if not config.exists():
        return False
    if config.stat().st_size == 0 or not config.read_text().rstrip().endswith("}"):
        return False  # cut while it was written: no reader takes it
    weights = json.loads(index.read_text())["weight_map"]
    for file in set(weights.values()):
        assert load_file(out / file).keys() == {name for name, owner in weights.items() if owner == file}
    return True


def adapter_complete(out: Path) -> bool:
    """Whether `adapter_config.json` is there; then it and the tensors must be readable."""
    if not (out / "adapter_config.json").exists():
        return False
    from mergekit_tspa import read_adapter

    return bool(read_adapter(out).modules)


def directory_complete(out: Path) -> bool:
    """Whether the directory is there at all; then it must be a model."""
    if not out.exists():
        return False
    assert (out / "config.json").exists() and load_file(out / "model.safetensors")
    return True


def all_complete(out: Path) -> bool:
    """Of several models below one directory; whether the last one, `final`, is complete."""
    return all([model_complete(model) for model in (out / "first", out / "final")])


def tasks(folder: Path, base: Path, adapters: list[Path]) -> dict[str, Task]:
    """Every command that writes, on a base of several shards; `folder` takes recipes and results."""
    from mergekit.scripts import multimerge, run_yaml

    from mergekit_tspa.commands import main as cli
    from mergekit_tspa.plugin import adapter_output as adapter

    emr = folder / "emr"
    plain, single = (
        write_recipe(folder / f"{m}.yml", recipe(m, base, adapters)) for m in ("core_tsv", "lora_emr")
    )
    first = recipe("core_tsv", base, adapters) | {"name": "first"}
    final = {
        "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": 1}} for m in ("first", str(base))],
    }
    several = write_recipe(folder / "several.yml", [first, final])
    finish(Task(run_yaml.main, [str(single), str(emr), "--no-copy-tokenizer"], emr, model_complete))
    out = {name: folder / name for name in ("yaml", "multi", "adapter", "task")}
    small = ["--no-copy-tokenizer", "--out-shard-size", "40K"]
    # mergekit writes the model card last, and takes an intermediate model without one for finished.
    together = [
        "--out-path",
        str(out["multi"] / "final"),
        "-I",
        str(out["multi"]),
        *small,
        "--no-write-model-card",
    ]
    return {
        "mergekit-yaml": Task(
            run_yaml.main, [str(plain), str(out["yaml"]), *small], out["yaml"], model_complete
        ),
        "mergekit-multi": Task(multimerge.main, [str(several), *together], out["multi"], all_complete),
        "mergekit-tspa adapter": Task(
            adapter.main, [str(plain), str(out["adapter"])], out["adapter"], adapter_complete
        ),
        "mergekit-tspa emr-task": Task(
            cli.main,
            ["emr-task", str(emr), adapters[0].name, "--out", str(out["task"])],
            out["task"],
            directory_complete,
        ),
    }


def fork(task: Task, prepare: Callable[[], None] = lambda: None) -> int:
    """Run the command in a child of this process, which has imported it already; the child's number."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        torch.set_num_threads(1)  # the parent's threads are not there
        tqdm.set_lock(threading.RLock())  # its own is shared by all forks, and a killed one may hold it
        prepare()
        task.command.main(task.arguments, standalone_mode=False)
        code = 0
    except BaseException as error:
        Path(f"{task.out}.error").write_text(f"{type(error).__name__}: {error}")
    finally:
        os._exit(code)


def finish(task: Task, prepare: Callable[[], None] = lambda: None) -> None:
    _, status = os.waitpid(fork(task, prepare), 0)
    assert status == 0, Path(f"{task.out}.error").read_text()


def contents(out: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()
    }


def kill(task: Task, times: int, seed: int = 0) -> Outcome:
    """Kill the command `times` times, each at a random moment of its run.

    Every second kill is followed by another attempt in the same directory, which must give the same bytes.
    """
    chance, begin = random.Random(seed), time.perf_counter()
    finish(task)
    shutil.rmtree(task.out)
    start = time.perf_counter()
    finish(task)
    duration, expected = time.perf_counter() - start, contents(task.out)
    found = {True: 0, False: 0}
    for attempt in range(times):
        if attempt % 4 == 0:  # else over a whole result, or what the last kill left
            shutil.rmtree(task.out, ignore_errors=True)
        child = fork(task)
        time.sleep(chance.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found[task.complete(task.out)] += 1
        if attempt % 2:
            if task.complete is directory_complete:  # its command refuses a directory that is there
                shutil.rmtree(task.out, ignore_errors=True)
            finish(task)
            assert task.complete(task.out) and expected.items() <= contents(task.out).items()
    return Outcome(found[True], found[False], time.perf_counter() - begin)
