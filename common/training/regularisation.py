"""Promise: regularisers do not depend on how a step is cut into batches, and resume exactly.

`common.args.RegularisationArguments` has the arguments. No regulariser but dropout uses the global random state: random
numbers follow from the seed, the step, and the row or weight. Averaged weights are evaluated and saved.
"""

import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from common.errors import InputError
from common.models.structure import input_embeddings, transformer_of
from common.training.base import TrainerBase
from common.training.random_state import RandomState

Logits = Tensor | tuple[Tensor, ...]


# R-Drop


def repeat_batch(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Append all rows of a batch to the batch again."""
    return {n: torch.cat([value, value]) if isinstance(value, Tensor) else value for n, value in inputs.items()}


def divergence(logits: Logits, labels: Tensor) -> Tensor:
    """Compute the penalty of R-Drop: (KL(p, q) + KL(q, p)) / 2, summed over the labels that are not -100.

    p and q are the distributions of the first and the second half of a batch of `repeat_batch` (Liang et al. 2021,
    https://arxiv.org/abs/2106.14448, equation 2).

    Args:
        logits: shape (rows, ..., classes), or (1, labels, classes) without labels of -100; the shape of `labels` for
            independent binary labels; or a tuple with (rows, classes) for each column of `labels`.
        labels: shape (rows, ...).
    """
    if isinstance(logits, tuple):
        return torch.stack([divergence(one, labels[..., i]) for i, one in enumerate(logits)]).sum()
    if logits.shape == labels.shape:  # sigmoid(x) is the first value of softmax((x, 0))
        logits = torch.stack([logits, torch.zeros_like(logits)], dim=-1)
    elif logits.shape[:-1] == labels.shape:
        logits = logits[labels != -100]
    logs = F.log_softmax(logits.float().flatten(0, -2), dim=-1)
    p, q = logs.exp().chunk(2)
    log_p, log_q = logs.masked_fill(logs == -torch.inf, 0).chunk(2)
    return ((p - q) * (log_p - log_q)).sum() / 2


# Adversarial embeddings


class Adversary:
    """Perturb the embeddings of each row in the direction of the greatest loss, and train on the perturbed rows too.

    - FGM (Miyato et al. 2017, https://arxiv.org/abs/1605.07725, equations 1 and 5): two passes, without and with the
      perturbation r = epsilon g / |g|. g is the gradient of the loss by the embeddings of the row, as one vector.
    - FreeLB (Zhu et al. 2020, https://arxiv.org/abs/1909.11764, algorithm 1): `steps` passes. The first perturbation is
      d ~ U(-epsilon, epsilon) / sqrt(n) for n values in a row. Each later one is d + a g / |g| with step size a,
      projected back to length epsilon. All passes have the same dropout masks.

    The gradient is the mean over the passes: a sum (as in the paper of FGM) changes the meaning of learning rate and
    clipping. The word embeddings are perturbed, without padding; in an encoder-decoder those of the encoder.
    """

    def __init__(self, model: nn.Module, epsilon: float, steps: int | None, step_size: float | None, seed: int):
        transformer = transformer_of(model)
        reader = transformer.get_encoder() if transformer.config.is_encoder_decoder else transformer
        self.embeddings = input_embeddings(reader)
        self.embeddings.register_forward_hook(self._move)
        self.random, self.seed = steps is not None, seed
        self.epsilon, self.passes = epsilon, steps or 2
        self.step_size = epsilon if step_size is None else step_size
        self.delta: Tensor | None = None

    def perturbed(self, inputs: dict[str, Tensor], step: int) -> Iterator[bool]:
        """Yield once a pass, True for the last; the caller runs `inputs` forward and backward in each pass."""
        ids = inputs["input_ids"]
        mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones_like(ids).bool()
        delta = self._first(ids, mask, step)
        random = RandomState()
        try:
            for i in range(self.passes):
                if i:
                    random.restore()
                self.delta, self.waiting = delta.requires_grad_(), True
                yield i == self.passes - 1
                if delta.grad is None:
                    raise InputError("--adversarial: this model passes no gradient to its embeddings; leave it out")
                if i < self.passes - 1:
                    delta = self._next(delta.detach(), delta.grad, mask)
        finally:
            self.delta = None  # also if the step fails

    def _first(self, ids: Tensor, mask: Tensor, step: int) -> Tensor:
        width = self.embeddings.weight.shape[1]
        delta = np.zeros((*ids.shape, width), dtype=np.float32)
        if self.random:
            for row, tokens, real in zip(delta, ids.cpu().numpy(), mask.cpu().numpy(), strict=True):
                key = zlib.crc32(tokens[real].astype(np.int64).tobytes())
                values = np.random.default_rng([self.seed, step, key]).random((real.sum(), width), dtype=np.float32)
                row[real] = (2 * values - 1) * self.epsilon / np.sqrt(max(values.size, 1))
        return torch.from_numpy(delta).to(ids.device)

    def _next(self, delta: Tensor, gradient: Tensor, mask: Tensor) -> Tensor:
        gradient = torch.nan_to_num(gradient * mask[..., None])
        delta = delta + self.step_size * gradient / _lengths(gradient).clamp(min=torch.finfo(torch.float32).tiny)
        return delta * (self.epsilon / _lengths(delta).clamp(min=self.epsilon))

    def _move(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if self.delta is None or not self.waiting:  # a decoder with shared embeddings reads after the encoder
            return output
        self.waiting = False
        return output + self.delta.to(output.dtype)


def _lengths(rows: Tensor) -> Tensor:
    return rows.flatten(1).norm(dim=1)[:, None, None]


# Pretrained weights


def pretrained_parameters(model: nn.Module, pretrained: set[str], argument: str) -> dict[str, nn.Parameter]:
    """Return the parameters of `model` whose names are in `pretrained`, trainable or not.

    Raises:
        InputError: none of them is trainable, as in a new model or under LoRA.
    """
    parameters = {name: value for name, value in model.named_parameters() if name in pretrained}
    if not any(value.requires_grad for value in parameters.values()):
        raise InputError(f"--{argument}: needs trained pretrained weights, and this run trains none; leave it out")
    return parameters


def for_new_rows(importance: Tensor, weight: Tensor) -> Tensor:
    """Return the importance of a weight, which is 0 in rows that were added since, such as those of new tokens."""
    new = weight.shape[:1].numel() - importance.shape[:1].numel()
    if new > 0 and weight.shape[1:] == importance.shape[1:]:
        return torch.cat([importance, importance.new_zeros((new, *importance.shape[1:]))])
    return importance


class PullToPretrained:
    """Add the gradient of `strength / 2` times the squared distance from the pretrained weights.

    With `importance`, the squared distance of each weight is multiplied by its importance. This is L2-SP without it (Li
    et al. 2018, https://arxiv.org/abs/1802.01483, equation 4), and EWC with the Fisher information (Kirkpatrick et al.
    2017, https://arxiv.org/abs/1612.00796, equation 3).

    The pull replaces the weight decay of these weights; a new head keeps weight decay (beta of Li et al.). The reported
    loss does not include the penalty.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], strength: float, importance: dict[str, Tensor] | None = None
    ):
        self.strength, self.importance = strength, importance
        self.pairs = {name: (value, value.detach().clone()) for name, value in parameters.items()}

    @torch.no_grad()
    def add_gradient(self, scale: float = 1.0) -> None:
        """Add the gradient of the penalty once a step; `scale` is the loss scale of fp16."""
        for name, (value, before) in self.pairs.items():
            if value.grad is not None:
                distance = value - before.to(value.device)
                if self.importance is not None:
                    distance *= self.importance[name].to(value.device)
                value.grad.add_(distance, alpha=self.strength * scale)


class Mixout:
    """Replace trained values by pretrained ones with probability `p` in each step (Mixout).

    The step is computed at ((1 - m) w + m u - p u) / (1 - p), whose mean is w. w is the weight, u the pretrained
    weight, and m ~ Bernoulli(p) for each value and step. As in the code of the authors, only matrices of linear layers
    are mixed: not biases, norms, embeddings or a new head. The authors use it in place of dropout (`--dropout 0`).
    Lee et al. 2020, https://arxiv.org/abs/1909.11299, equation 4.
    """

    def __init__(self, model: nn.Module, parameters: dict[str, nn.Parameter], p: float, seed: int):
        linear = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))}
        linear -= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}  # tied to it
        self.pairs = [(w, w.detach().clone()) for w in parameters.values() if id(w) in linear]
        self.p, self.seed = p, seed
        self.mixed: list[tuple[nn.Parameter, Tensor, Tensor]] = []

    @torch.no_grad()
    def mix(self, step: int) -> None:
        """Mix the weights before each batch of step `step`; all batches of a step get the same mixture."""
        if self.mixed:
            return
        seed = int(np.random.SeedSequence([self.seed, step]).generate_state(1, np.uint64)[0] >> 1)
        generators: dict[torch.device, torch.Generator] = {}
        for weight, before in self.pairs:
            if not weight.requires_grad:
                continue
            device = weight.device
            generator = generators.setdefault(device, torch.Generator(device).manual_seed(seed))
            taken = torch.empty(weight.shape, dtype=torch.bool, device=device).bernoulli_(self.p, generator=generator)
            self.mixed.append((weight, weight.detach().clone(), taken))
            before = before.to(device)
            weight.copy_((torch.where(taken, before, weight) - self.p * before) / (1 - self.p))

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the weights and convert their gradient, once the gradient of the step is complete."""
        for weight, trained, taken in self.mixed:
            weight.copy_(trained)
            if weight.grad is not None:
                weight.grad.masked_fill_(taken, 0).div_(1 - self.p)
        self.mixed = []

    def forget(self) -> None:
        """Forget a mixture whose weights were reloaded in the middle of a step."""
        self.mixed = []


# Averaged weights


class WeightAverage:
    """Average the weights over steps, for evaluation and saving.

    - `decay` d (EMA): mean = d mean + (1 - d) w after each step, from the initial weights on. In early steps d is at
      most (1 + step) / (10 + step), because the initial weights would dominate short runs.
    - `start` (SWA): the plain mean of the weights after step `start` and all later steps; below 1 `start` is a share of
      the steps. Izmailov et al. 2018, https://arxiv.org/abs/1803.05407, algorithm 1 with c = 1. The paper uses a
      constant learning rate (`--lr_scheduler_type constant`).
    """

    def __init__(self, decay: float | None, start: float | None):
        self.decay, self.start = decay, start
        self.mean: dict[str, Tensor] = {}
        #: trained weights from a checkpoint that holds the mean
        self.resumed: dict[str, Tensor] = {}

    def begin(self, max_steps: int) -> None:
        """Reset at the start of a run of `max_steps` steps; `load` restores a resumed run."""
        self.mean = {}
        if self.start is not None:
            self.first = max(1, int(self.start if self.start >= 1 else np.ceil(self.start * max_steps)))
            if self.first > max_steps:
                raise InputError(f"--swa_start {self.start:g}: the run has {max_steps} steps; give a share below 1")

    @torch.no_grad()
    def before_step(self, model: nn.Module) -> None:
        """Add newly trained weights to the mean."""
        if self.decay is not None or self.mean:
            for name, value in _trained(model).items():
                if name not in self.mean:
                    self.mean[name] = value.detach().clone()

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        """Update the mean with the weights after step `step`, counted from 1."""
        if self.decay is not None:
            share = 1 - min(self.decay, (1 + step) / (10 + step))
        elif step >= self.first:
            share = 1 / (step - self.first + 1)
        else:
            return
        for name, value in _trained(model).items():
            if name in self.mean:
                self.mean[name].lerp_(value, share)
            else:
                self.mean[name] = value.detach().clone()

    def load(self, model: nn.Module, unaveraged: dict[str, Tensor]) -> None:
        """Resume from a checkpoint: `model` has the mean, and `unaveraged` the trained weights."""
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in unaveraged.items():
                self.mean[name] = parameters[name].detach().clone()
                parameters[name].copy_(value)

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Give `model` the mean weights within a `with` block; yield the trained weights by name."""
        trained = {name: value.detach().clone() for name, value in model.named_parameters() if name in self.mean}
        self._put(model, self.mean)
        try:
            yield trained
        finally:
            self._put(model, trained)

    def apply_mean(self, model: nn.Module) -> None:
        """Set the weights of `model` to the mean after training."""
        self._put(model, self.mean)
        self.mean = {}

    @torch.no_grad()
    def _put(self, model: nn.Module, values: dict[str, Tensor]) -> None:
        for name, value in model.named_parameters():
            if name in values:
                value.copy_(values[name])


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


# In the trainer


class RegularisedSteps(TrainerCallback):
    """Call weight averaging and Mixout at each step."""

    def __init__(self, average: WeightAverage | None, mixout: Mixout | None):
        self.average, self.mixout = average, mixout

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.average:
            self.average.begin(state.max_steps)
            self.average.load(model, self.average.resumed)
            self.average.resumed = {}
        if self.mixout:
            self.mixout.forget()

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.average:
            self.average.before_step(model)
        if self.mixout:
            self.mixout.mix(state.global_step)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.average:
            self.average.after_step(model, state.global_step)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.average:
            self.average.apply_mean(model)


class Regularised(TrainerBase):
    """Train with the regularisers that the arguments select."""

    average: WeightAverage | None = None
    mixout: Mixout | None = None
    adversary: Adversary | None = None
    pull: PullToPretrained | None = None
    fisher_pull: PullToPretrained | None = None

    def fisher(self) -> dict[str, Tensor]:
        """Return the importance of each weight for the old rows, for `--keep ewc`."""
        raise NotImplementedError

    def regularise(self) -> None:
        """Create the selected regularisers; call it while the model has its initial weights."""
        args, seed = self.args, self.args.seed
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        for name in ("l2_sp", "mixout", "adversarial", "ema_decay", "swa_start", "keep", "save_fisher"):
            if sharded and getattr(args, name) not in (None, 0.0, False, "none", "replay"):
                raise InputError(
                    f"--{name}: does not work with sharded weights; launch with common/launch/multi_gpu.yaml"
                )
        if args.l2_sp:
            self.pull = PullToPretrained(pretrained_parameters(self.model, self.tuned.pretrained, "l2_sp"), args.l2_sp)
        if args.keep == "ewc":
            pretrained, importance = pretrained_parameters(self.model, self.tuned.pretrained, "keep ewc"), self.fisher()
            importance = {n: for_new_rows(importance[n], p) for n, p in pretrained.items() if n in importance}
            pulled = {n: p for n, p in pretrained.items() if n in importance and importance[n].shape == p.shape}
            if not pulled:
                raise InputError("--keep ewc: the weights of --after have other names than those here; leave it out")
            self.fisher_pull = PullToPretrained(pulled, args.keep_strength or 0.0, importance)
        if args.mixout:
            pretrained = pretrained_parameters(self.model, self.tuned.pretrained, "mixout")
            self.mixout = Mixout(self.model, pretrained, args.mixout, seed)
        if args.adversarial:
            freelb = args.adversarial_steps, args.adversarial_step_size
            assert args.adversarial_epsilon is not None  # `check_regularisation` replaces None
            self.adversary = Adversary(self.model, args.adversarial_epsilon, *freelb, seed)
            self.passes = self.adversary.passes
        if args.ema_decay is not None or args.swa_start is not None:
            self.average = WeightAverage(args.ema_decay, args.swa_start)
        self.add_callback(RegularisedSteps(self.average, self.mixout))

    def averaged(self) -> AbstractContextManager[dict[str, Tensor]]:
        """Give the model its mean weights within a `with` block, as `WeightAverage.in_place`."""
        return self.average.in_place(self.model) if self.average else nullcontext({})

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the parameters with weight decay: all but those under L2-SP or EWC."""
        pulled = {name for pull in (self.pull, self.fisher_pull) if pull for name in pull.pairs}
        return [name for name in super().get_decay_parameter_names(model) if name not in pulled]

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Compute loss and gradient of a batch, and complete the gradient with the last batch of a step."""
        whole = self.accelerator.sync_gradients
        if self.args.r_drop:
            inputs = repeat_batch(inputs)
            num_items_in_batch = {name: 2 * count for name, count in num_items_in_batch.items()}
        if self.adversary:
            losses = []
            for last in self.adversary.perturbed(inputs, self.state.global_step):
                with nullcontext() if whole and last else self.accelerator.no_sync(model):
                    losses.append(super().training_step(model, dict(inputs), num_items_in_batch))
            loss = torch.stack(losses).mean()
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_losses.append(loss)
        if whole:
            self._complete_gradient()
        return loss

    def _complete_gradient(self) -> None:
        """Apply the regularisers to the gradient of a step, once it is summed over batches and processes."""
        if self.adversary:
            for value in self.model.parameters():
                if value.grad is not None:
                    value.grad.div_(self.adversary.passes)
        if self.mixout:
            self.mixout.restore()
        for pull in (self.pull, self.fisher_pull):
            if pull:
                pull.add_gradient(1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale())
