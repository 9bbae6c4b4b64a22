"""Name the score that selects the best checkpoint."""

#: begin of the names of a score over domains: the mean of the domains, and the worst domain
MEAN, WORST = "mean_domain_", "worst_domain_"


def score_of_rows(metric: str | None) -> str:
    """Return the score that `--metric_for_best_model` names, without the mean or the worst over domains."""
    return (metric or "loss").removeprefix("eval_").removeprefix(MEAN).removeprefix(WORST)
