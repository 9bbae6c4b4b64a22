"""List the private methods of `transformers.Trainer` that this folder overrides, each with its promise.

A release of transformers may change them without notice. `tests/common/training/test_upstream.py` compares their source
with `sha256` and names the promise to check again.
"""

import hashlib
import inspect
from typing import NamedTuple

import transformers


class Override(NamedTuple):
    """An overridden private method.

    Attributes:
        file: module of this folder that overrides the method.
        promise: behaviour to check again when the method changes.
        why: reason why no public hook can do this.
        sha256: hash of its source in the tested release.
    """

    file: str
    promise: str
    why: str
    sha256: str


OVERRIDES = {
    "_get_train_sampler": Override(
        "order",
        "seed and epoch alone decide which rows a step takes",
        "`get_train_dataloader` passes this method on and takes no sampler",
        "1580d7493244e637dc53324da1ee594fdc5645b06972bb8cbc49ea08141dc88d",
    ),
    "_get_eval_sampler": Override(
        "evaluation",
        "rows are sorted by length and returned in data set order",
        "`get_eval_dataloader` passes this method on and takes no sampler",
        "f0213c4ba087dcaf75f3d8768b67502158e55aa413d2edb2cc51dd03b62e1907",
    ),
    "_maybe_log_save_evaluate": Override(
        "interrupts",
        "a checkpoint at the end of an epoch holds the evaluation of that epoch; a signal stops the run after it",
        "`--save_strategy best` decides after `on_step_end` whether to save; no callback follows a step without a save",
        "af101534f0f7b2d7fa6984044242e6f125c51092b05c755566c14823f2b43696",
    ),
    "_get_grad_norm": Override(
        "finite",
        "a gradient that is not finite stops the run before the step",
        "`on_pre_optimizer_step` gets no norm; computing it again costs 2 % of a step of a 22 M model",
        "913ba6f52f074d10a4981ffcaac608e99d1b9caaa21666d86f3ea0ad91f05753",
    ),
    "_determine_best_metric": Override(
        "saving",
        "of equal scores, the one with the lowest validation loss is the best",
        "callbacks come after the best step was chosen; the earliest of equal scores is an undertrained model",
        "7aa77355a0c33b677621ed2f820a9d48d6e02cbf3a7156bd005255b1fbb53eaf",
    ),
    "_get_output_dir": Override(
        "saving",
        "checkpoints are written to a staging folder, and the parent removes none outside of it",
        "`--output_dir` holds the model, the record and the whole checkpoints",
        "97172085342ac46c33cb3d63ab5160c33eb66d24e3a0e5c339c5bbb8b3862980",
    ),
    "_save_checkpoint": Override(
        "saving",
        "a checkpoint is whole or absent",
        "`on_save` comes after the files have been written in place",
        "a9111e30faa9933986e022e56b5af81fd990356db64d727b4c320c852283bf3b",
    ),
    "_save": Override(
        "saving",
        "a checkpoint has the names of `state_dict`; a module of one's own may have tied weights",
        "`save_model` passes no option to `save_pretrained`, and safetensors refuses tensors that share memory",
        "b136889e8792837686efc159b5297c5cc60d68d75102d0b0c643c136c57223ce",
    ),
    "_load_from_checkpoint": Override(
        "resume",
        "all weights come from the checkpoint; no code is run",
        "`train` loads them before the first callback",
        "a2804e8d93a297e30d11e1589e707793302c872fc3ab89cddefc6cb2762e3a24",
    ),
    "_load_best_model": Override(
        "resume",
        "the best weights are loaded from a checkpoint that verifies",
        "`on_train_end` comes after they were loaded",
        "0e183d55a9db7414c6dc67cff973a46ec97264769172c6162df35c0138a1043a",
    ),
    "_load_optimizer_and_scheduler": Override(
        "resume",
        "a damaged file of a checkpoint is reported with its name",
        "`train` loads them before the first callback",
        "741032f57d6fb80211506bf521f67bdd0ff876ad39cc50e700c9c2bab2efb251",
    ),
    "_load_rng_state": Override(
        "resume",
        "a damaged file of a checkpoint is reported with its name",
        "the loop loads them after `on_epoch_begin`, between two batches",
        "d5ebdfc0a0884c4b853236b4974bbae38b5c2b7d90c91d87a5621a261240b5dd",
    ),
}


def source_hash(method: str) -> str:
    """Return the SHA-256 of the source of a method of the installed `transformers.Trainer`."""
    return hashlib.sha256(inspect.getsource(getattr(transformers.Trainer, method)).encode()).hexdigest()
