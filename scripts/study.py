"""The whole plasticity study in one command: models x corpora x samples -> tables, figures, verdicts, report.html.

    python scripts/study.py --model model_cards/ttt-linear-tiny --setting smoke --exp_name trial
    accelerate launch --config_file scripts/configs/two_cpu.yaml scripts/study.py --processes 2 --exp_name study

The folder holds `cells/` (a run folder per model, corpus and sample), `tables/` (csv and parquet), `figures/` and
`report.html`. The same command again goes on where it stopped, and does only what is missing. Every process reads its
own cells; tables do not depend on how many there are. `--text` reads files instead of Python's language reference.
"""

import hashlib
import logging
import shutil
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from _shared import option, parse, prepare, repeated, run, run_folder
from accelerate import PartialState

from interp.files import read_json, to_json, write_text
from interp.loading import load_tokenizer
from interp.resampling import Bootstrap
from interp.study_cells import model_shape, read_cells
from interp.study_data import read_study
from interp.study_plan import SETTINGS, Cell, Setting, StudyModel, plan_cells, share_out
from interp.study_report import write_study

log = logging.getLogger("study")
BUNDLED = ("ttt-linear-tiny", "ttt-mlp-tiny", "llama-tiny")


@dataclass
class StudyArguments:
    """Run the plasticity study; leave one folder with tables, figures and report.html."""

    model: list[str] = repeated("folder or Hub id; may be repeated (default: the bundled checkpoints)")
    setting: Literal[tuple(SETTINGS)] = option("small", "how much is read")
    samples: int | None = option(None, "samples of documents per part (default: that of the setting)")
    text: list[str] = repeated("text files to read instead of the language reference of Python")
    untrained: bool = option(True, "whether the first TTT model is also read with random weights, as a control")
    device: Literal["cpu", "auto"] = option("cpu", "auto: an accelerator for every process, if there is one")
    processes: int | None = option(None, "how many processes must take part; the study ends when there are others")
    n_boot: int = option(1000, "resamples behind every interval")
    exp_dir: str = option("results", "folder of all results")
    exp_name: str = option("study", "name of this study's folder")
    overwrite: bool = option(False, "begin anew, whatever the folder holds")
    seed: int = option(0, "seed of the resamples")


def main(argv: list[str] | None = None) -> int:
    arguments = parse(StudyArguments, argv)
    state = PartialState(cpu=arguments.device == "cpu", timeout=timedelta(days=7))
    prepare(arguments.seed, state.is_main_process)
    if arguments.processes is not None and arguments.processes != state.num_processes:
        raise ValueError(f"processes must be {arguments.processes} as asked, the launch made {state.num_processes}")
    folder = run_folder(arguments.exp_dir, arguments.exp_name)
    setting = SETTINGS[arguments.setting]
    if arguments.samples is not None:
        setting = replace(setting, samples=arguments.samples)
    models = study_models(arguments)
    cells = plan_cells([model_shape(model) for model in models], setting)
    if state.is_main_process:
        begin(folder, describe(models, setting, arguments.text), arguments.overwrite)
    state.wait_for_everyone()
    own = share_out(cells, state.num_processes)[state.process_index]
    options = {"texts": arguments.text, "device": state.device, "progress": state.is_main_process}
    read_cells(own, folder / "cells", setting, **options)
    state.wait_for_everyone()
    if state.is_main_process:
        finish(folder, cells, models, arguments)
    state.wait_for_everyone()
    return 0


def study_models(arguments: StudyArguments) -> list[StudyModel]:
    """The models to read, with an untrained copy of the first one that has TTT layers."""
    paths = arguments.model or [str(Path(__file__).parents[1] / "model_cards" / name) for name in BUNDLED]
    models = [StudyModel(Path(path).name, path) for path in paths]
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        raise ValueError(f"models must differ in the last part of their names, got {paths}")
    learners = [model for model in models if model_shape(model)[1].layers]
    if not learners:
        raise ValueError(f"the study needs a model with TTT layers, got {paths}")
    if arguments.untrained:
        models.append(StudyModel(f"{learners[0].name}-untrained", learners[0].path, untrained=0))
    return models


def describe(models: list[StudyModel], setting: Setting, texts: list[str]) -> dict[str, Any]:
    """What the study depends on: a folder is gone on with only when it is the same."""
    return {
        "models": [{"name": m.name, "untrained": m.untrained, "weights": weights_hash(m.path)} for m in models],
        "setting": asdict(setting),
        "texts": [[Path(text).name, hashlib.sha256(Path(text).read_bytes()).hexdigest()] for text in texts],
    }


def weights_hash(path: str) -> str | None:
    """SHA-256 of the weights in a local folder, None for a Hub id."""
    files = sorted(Path(path).glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest() if files else None


def begin(folder: Path, plan: dict[str, Any], overwrite: bool) -> None:
    """Make the folder, or see that it holds this study; ValueError when it holds another one."""
    file = folder / "plan.json"
    if folder.exists() and not file.exists() and any(folder.iterdir()):
        raise ValueError(f"{str(folder)!r} holds no study: it is not {'overwritten' if overwrite else 'written into'}")
    if overwrite and folder.exists():
        shutil.rmtree(folder)
    wanted = to_json(plan)
    if file.exists() and to_json(read_json(file)) != wanted:
        raise ValueError(f"{str(folder)!r} holds another study: overwrite it, or choose another exp_name")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(file, wanted)


def finish(folder: Path, cells: list[Cell], models: list[StudyModel], arguments: StudyArguments) -> None:
    """Compute tables, figures and report, and say what they say."""
    tokenizers = {model.name: load_tokenizer(model.path) for model in models}
    boot = Bootstrap(n_boot=arguments.n_boot, seed=arguments.seed)
    told = write_study(read_study(cells, folder / "cells"), folder, tokenizers, boot=boot, progress=True)
    print(told)
    print(f"{folder / 'report.html'}")


if __name__ == "__main__":
    run(main)
