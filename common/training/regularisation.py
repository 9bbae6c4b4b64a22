"""Promise: regularisers beside weight decay give the same run however its steps are cut, and when it is resumed.

`common.args.RegularisationArguments` has the arguments. Dropout aside, none of the regularisers draws from the global
random state: what is drawn follows from the seed, the step and the row or weight. Where the weights are averaged, their
mean is evaluated and saved.
"""

import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from common.errors import InputError
from common.models.structure import transformer_of

Logits = Tensor | tuple[Tensor, ...]


# R-Drop


def repeat_batch(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch with each of its rows a second time, behind all others."""
    return {n: torch.cat([value, value]) if isinstance(value, Tensor) else value for n, value in inputs.items()}


def divergence(logits: Logits, labels: Tensor) -> Tensor:
    """What R-Drop makes small: (KL(p, q) + KL(q, p)) / 2, summed over the labels that are not -100.

    p and q are the distributions of the first and the second half of the rows of a batch of `repeat_batch`. `logits`
    has shape (rows, ..., classes) for `labels` of (rows, ...), or (1, labels, classes) without those that are -100, or
    the shape of `labels`, each then being of a class of its own; or is one (rows, classes) for each column of `labels`.
    Liang et al. 2021, https://arxiv.org/abs/2106.14448, equation 2.
    """
    if isinstance(logits, tuple):
        return torch.stack([divergence(one, labels[..., i]) for i, one in enumerate(logits)]).sum()
    if logits.shape == labels.shape:  # sigmoid(x) is the first of softmax((x, 0))
        logits = torch.stack([logits, torch.zeros_like(logits)], dim=-1)
    elif logits.shape[:-1] == labels.shape:
        logits = logits[labels != -100]
    logs = F.log_softmax(logits.float().flatten(0, -2), dim=-1)
    p, q = logs.exp().chunk(2)
    log_p, log_q = logs.masked_fill(logs == -torch.inf, 0).chunk(2)
    return ((p - q) * (log_p - log_q)).sum() / 2


# Adversarial embeddings


class Adversary:
    """Moves the embeddings of each row in the direction in which the loss grows most, and trains on these too.

    - FGM (Miyato et al. 2017, https://arxiv.org/abs/1605.07725, equations 1 and 5): a row's embeddings, as one vector,
      are moved by r = epsilon g / |g|, where g is the gradient of its loss; trained are the loss without and with r.
    - FreeLB (Zhu et al. 2020, https://arxiv.org/abs/1909.11764, algorithm 1): `steps` passes. The row of the first is
      moved by d ~ U(-epsilon, epsilon) / sqrt(n), n its number of values; that of each next one by d + a g / |g|, a the
      step size, and brought back to a length of epsilon. All passes drop the same values. The gradient is their mean.

    In both the gradient is the mean of that of the passes, so that learning rate and clipping mean what they always do
    (FGM's paper sums). The word embeddings are moved, of encoder-decoders the encoder's; padding is not.
    """

    def __init__(self, model: nn.Module, epsilon: float, steps: int | None, step_size: float | None, seed: int):
        transformer = transformer_of(model)
        reader = transformer.get_encoder() if transformer.config.is_encoder_decoder else transformer
        self.embeddings = reader.get_input_embeddings()
        self.embeddings.register_forward_hook(self._move)
        self.random, self.seed = steps is not None, seed
        self.epsilon, self.passes = epsilon, steps or 2
        self.step_size = epsilon if step_size is None else step_size
        self.delta: Tensor | None = None

    def perturbed(self, inputs: dict[str, Tensor], step: int) -> Iterator[bool]:
        """Yields once for each pass, in which `inputs` must go forward and back; True for the last."""
        ids = inputs["input_ids"]
        mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones_like(ids).bool()
        delta = self._first(ids, mask, step)
        cpu = torch.get_rng_state()
        gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        try:
            for i in range(self.passes):
                if i:
                    torch.set_rng_state(cpu)
                    for device, state in enumerate(gpu):
                        torch.cuda.set_rng_state(state, device)
                self.delta, self.waiting = delta.requires_grad_(), True
                yield i == self.passes - 1
                if delta.grad is None:
                    raise InputError("--adversarial: this model hands no gradient to its embeddings; leave it out")
                if i < self.passes - 1:
                    delta = self._next(delta.detach(), delta.grad, mask)
        finally:
            self.delta = None  # also where the step ends early

    def _first(self, ids: Tensor, mask: Tensor, step: int) -> Tensor:
        width = self.embeddings.weight.shape[1]
        delta = np.zeros((*ids.shape, width), dtype=np.float32)
        if self.random:
            for row, own, real in zip(delta, ids.cpu().numpy(), mask.cpu().numpy(), strict=True):
                key = zlib.crc32(own[real].astype(np.int64).tobytes())
                values = np.random.default_rng([self.seed, step, key]).random((real.sum(), width), dtype=np.float32)
                row[real] = (2 * values - 1) * self.epsilon / np.sqrt(max(values.size, 1))
        return torch.from_numpy(delta).to(ids.device)

    def _next(self, delta: Tensor, gradient: Tensor, mask: Tensor) -> Tensor:
        gradient = torch.nan_to_num(gradient * mask[..., None])
        delta = delta + self.step_size * gradient / _lengths(gradient).clamp(min=torch.finfo(torch.float32).tiny)
        return delta * (self.epsilon / _lengths(delta).clamp(min=self.epsilon))

    def _move(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if self.delta is None or not self.waiting:  # a decoder that shares the layer reads after the encoder
            return output
        self.waiting = False
        return output + self.delta.to(output.dtype)


def _lengths(rows: Tensor) -> Tensor:
    return rows.flatten(1).norm(dim=1)[:, None, None]


# Toward the pretrained weights


def pretrained_parameters(model: nn.Module, pretrained: set[str], argument: str) -> dict[str, nn.Parameter]:
    """Return the parameters of `model` that are named in `pretrained`, trained at first or not.

    Raises:
        InputError: none of them is trained, as in a new model, or if matrices beside them are (LoRA).
    """
    found = {name: value for name, value in model.named_parameters() if name in pretrained}
    if not any(value.requires_grad for value in found.values()):
        raise InputError(f"--{argument}: holds pretrained weights where they are, and this run trains none of them")
    return found


class PullToPretrained:
    """L2-SP: adds the gradient of `strength / 2` times the squared distance from the pretrained weights.

    For these it takes the place of weight decay, which pulls toward 0 and goes on doing so for the new head (beta in
    the paper). The loss that is reported is without it. Li et al. 2018, https://arxiv.org/abs/1802.01483, equation 4.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], strength: float):
        self.strength = strength
        self.pairs = {name: (value, value.detach().clone()) for name, value in parameters.items()}

    @torch.no_grad()
    def add_gradient(self, scale: float = 1.0) -> None:
        """Call it once a step, when its gradient is whole; `scale` is what that is multiplied by (fp16)."""
        for value, before in self.pairs.values():
            if value.grad is not None:
                value.grad.add_(value - before.to(value.device), alpha=self.strength * scale)


class Mixout:
    """Mixout: in each step a pretrained value stands in for a trained one with probability `p`.

    With m ~ Bernoulli(p) for each weight and step, w the weight and u the pretrained one, the step is taken at
    ((1 - m) w + m u - p u) / (1 - p), whose mean is w. As in the authors' code, matrices of linear layers are mixed and
    neither biases, norms, embeddings nor the new head; `--dropout 0` beside it gives what they compare with dropout.
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
        """Call it before each batch of step `step`; all of them meet the same mixed weights."""
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
        """Call it when the gradient of the step is whole: puts the weights back, and hands the gradient on to them."""
        for weight, own, taken in self.mixed:
            weight.copy_(own)
            if weight.grad is not None:
                weight.grad.masked_fill_(taken, 0).div_(1 - self.p)
        self.mixed = []

    def forget(self) -> None:
        """The weights were loaded anew in the middle of a step."""
        self.mixed = []


# Averages of weights


class WeightAverage:
    """A mean of the weights over the steps of a run, which is evaluated and saved in their place.

    - `decay` d: mean = d mean + (1 - d) w after each step, from the weights that the run began with. In the first steps
      d is (1 + step) / (10 + step) where that is less, or these would weigh on short runs.
    - `start`: the plain mean of the weights after step `start` and all later ones, or below 1 from that share of the
      steps on. Izmailov et al. 2018, https://arxiv.org/abs/1803.05407, algorithm 1 with c = 1; the paper holds the
      learning rate constant meanwhile (`--lr_scheduler_type constant`).
    """

    def __init__(self, decay: float | None, start: float | None):
        self.decay, self.start = decay, start
        self.mean: dict[str, Tensor] = {}
        #: of a checkpoint: the weights of which it holds the mean
        self.resumed: dict[str, Tensor] = {}

    def begin(self, max_steps: int) -> None:
        """Forget all; a run of `max_steps` steps begins, or goes on after `load`."""
        self.mean = {}
        if self.start is not None:
            self.first = max(1, int(self.start if self.start >= 1 else np.ceil(self.start * max_steps)))
            if self.first > max_steps:
                raise InputError(f"--swa_start {self.start:g}: the run has {max_steps} steps; give a share below 1")

    @torch.no_grad()
    def before_step(self, model: nn.Module) -> None:
        """Take up weights that begin to be trained."""
        if self.decay is not None or self.mean:
            for name, value in _trained(model).items():
                if name not in self.mean:
                    self.mean[name] = value.detach().clone()

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        """Take in the weights after step `step`, counted from 1."""
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
        """Go on from a checkpoint: the weights of `model` are the mean, and `unaveraged` has those that are trained."""
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in unaveraged.items():
                self.mean[name] = parameters[name].detach().clone()
                parameters[name].copy_(value)

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Within it `model` has the mean for its weights; yields its own, by name. Where there is none, nothing."""
        own = {name: value.detach().clone() for name, value in model.named_parameters() if name in self.mean}
        self._put(model, self.mean)
        try:
            yield own
        finally:
            self._put(model, own)

    def apply_mean(self, model: nn.Module) -> None:
        """Training is over: the mean becomes the weights of `model`."""
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
    """Averages the weights and mixes pretrained ones in, where the trainer is asked to."""

    def __init__(self, average: WeightAverage | None, mixout: Mixout | None):
        self.average, self.mixout = average, mixout

    def on_train_begin(self, args, state, control, model, **kwargs):
        if self.average:
            self.average.begin(state.max_steps)
            self.average.load(model, self.average.resumed)
            self.average.resumed = {}
        if self.mixout:
            self.mixout.forget()

    def on_step_begin(self, args, state, control, model, **kwargs):
        if self.average:
            self.average.before_step(model)
        if self.mixout:
            self.mixout.mix(state.global_step)

    def on_step_end(self, args, state, control, model, **kwargs):
        if self.average:
            self.average.after_step(model, state.global_step)

    def on_train_end(self, args, state, control, model, **kwargs):
        if self.average:
            self.average.apply_mean(model)


class Regularised(transformers.Trainer):
    """Trains with the regularisers that the arguments turn on."""

    average: WeightAverage | None = None
    mixout: Mixout | None = None
    adversary: Adversary | None = None
    pull: PullToPretrained | None = None

    def regularise(self) -> None:
        """Make ready what the arguments turn on, while the weights are those that the run begins with."""
        args, seed = self.args, self.args.seed
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        for name in ("l2_sp", "mixout", "adversarial", "ema_decay", "swa_start"):
            if sharded and getattr(args, name) not in (None, 0.0):
                raise InputError(
                    f"--{name}: not where FSDP or DeepSpeed shards the weights; launch with multi_gpu.yaml"
                )
        if args.l2_sp:
            self.pull = PullToPretrained(pretrained_parameters(self.model, self.tuned.pretrained, "l2_sp"), args.l2_sp)
        if args.mixout:
            pretrained = pretrained_parameters(self.model, self.tuned.pretrained, "mixout")
            self.mixout = Mixout(self.model, pretrained, args.mixout, seed)
        if args.adversarial:
            freelb = args.adversarial_steps, args.adversarial_step_size
            self.adversary = Adversary(self.model, args.adversarial_epsilon, *freelb, seed)
            self.passes = self.adversary.passes
        if args.ema_decay is not None or args.swa_start is not None:
            self.average = WeightAverage(args.ema_decay, args.swa_start)
        self.add_callback(RegularisedSteps(self.average, self.mixout))

    def averaged(self) -> AbstractContextManager[dict[str, Tensor]]:
        """Within it the model has the mean of its weights; gives the weights themselves, nothing without a mean."""
        return self.average.in_place(self.model) if self.average else nullcontext({})

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the parameters that decay: those that L2-SP pulls elsewhere do not."""
        names = super().get_decay_parameter_names(model)
        return [name for name in names if self.pull is None or name not in self.pull.pairs]

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Compute loss and gradient of a batch; with the last batch of a step complete the gradient."""
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
        """Change the gradient of a step once it is summed over batches and processes."""
        if self.adversary:
            for value in self.model.parameters():
                if value.grad is not None:
                    value.grad.div_(self.adversary.passes)
        if self.mixout:
            self.mixout.restore()
        if self.pull:
            self.pull.add_gradient(1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale())
