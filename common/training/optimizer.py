"""Promise: the learning rate of a parameter follows from its depth, or from its being an adapter (`layer_rates`)."""

import torch

from common.training.base import TrainerBase
from common.tuning.tune import layer_rates


class LayerRates(TrainerBase):
    """Group the parameters by learning rate and weight decay."""

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Create the optimizer, with the learning rate of each parameter."""
        shares = layer_rates(self.tuned)
        if shares is None or self.optimizer is not None:
            return super().create_optimizer(model)
        decays = set(self.get_decay_parameter_names(self.model))
        groups: dict[tuple[float, bool], list] = {}
        for name, weight in self.model.named_parameters():
            if weight.requires_grad:
                groups.setdefault((shares[name], name in decays), []).append(weight)
        optimizer_class, settings = self.get_optimizer_cls_and_kwargs(
            self.args,
            self.model,  # type: ignore[arg-type]  # any module will do
        )
        # the head, with share 1, comes first, because the rate of the first group is logged
        self.optimizer = optimizer_class(
            [
                {"params": weights, "lr": self.args.learning_rate * share}
                | {"weight_decay": self.args.weight_decay if decay else 0.0}
                for (share, decay), weights in sorted(groups.items(), key=lambda item: (item[0][0] != 1, -item[0][0]))
            ],
            **settings,
        )
        return self.optimizer
