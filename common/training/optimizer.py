"""Promise: under `--layerwise_lr_decay` each layer trains with the learning rate of its depth."""

import torch
import transformers

from common.tuning.tune import layer_rates


class LayerRates(transformers.Trainer):
    """Groups the parameters by learning rate and weight decay."""

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Create the optimizer; under `--layerwise_lr_decay` each layer has a learning rate of its own."""
        shares = layer_rates(self.tuned)
        if shares is None or self.optimizer is not None:
            return super().create_optimizer(model)
        decays = set(self.get_decay_parameter_names(self.model))
        groups: dict[tuple[float, bool], list] = {}
        for name, weight in self.model.named_parameters():
            if weight.requires_grad:
                groups.setdefault((shares[name], name in decays), []).append(weight)
        optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        # the head comes first: its rate is the one that is logged
        self.optimizer = optimizer_class(
            [
                {"params": weights, "lr": self.args.learning_rate * share}
                | {"weight_decay": self.args.weight_decay if decay else 0.0}
                for (share, decay), weights in sorted(groups.items(), key=lambda item: -item[0][0])
            ],
            **settings,
        )
        return self.optimizer
