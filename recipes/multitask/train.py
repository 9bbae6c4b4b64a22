"""Several tasks on one encoder: classification, tags, answers and unlabelled text together, each with its own head.

    make multitask
    make multitask ARGS="--tasks my_tasks.yaml --weighting uncertainty --metric_for_best_model worst"
    make multitask ARGS="--tasks my_tasks.yaml --sharing adapter --compare_single true"
    python -m recipes.multitask.train --config my.yaml

The samples, all-MiniLM-L6-v2, 2 cores (AMD EPYC, bf16), 4.9 minutes: mean of the test scores 0.464,
before training 0.355 (2026-11-30).
More in README.md.
"""

from datasets import DatasetDict
from transformers import set_seed

from common.args import ModelArguments, check_best_metric
from common.cli import command_line, parse
from common.errors import tell
from common.run import Run, keep_trained_model

from . import model, report, single, steps
from .arguments import MultitaskDataArguments, MultitaskTrainingArguments, SharingArguments
from .earlier import check_shared, check_sharing
from .reading import read_tasks

USAGE = """from transformers import AutoModel, AutoTokenizer

tokenizer, encoder = AutoTokenizer.from_pretrained("{folder}"), AutoModel.from_pretrained("{folder}")
vectors = encoder(**tokenizer("The encoder that all tasks share.", return_tensors="pt")).last_hidden_state"""

ARGUMENTS = (ModelArguments, MultitaskDataArguments, SharingArguments, MultitaskTrainingArguments)


@keep_trained_model
def main(argv: list[str] | None = None) -> dict[str, float]:
    # Arguments
    model_args, data_args, sharing, args = parse(ARGUMENTS, argv, __doc__)
    check_sharing(args, sharing)
    set_seed(args.seed)

    # Data
    entries, tasks = read_tasks(data_args.tasks, ARGUMENTS, argv, args)
    check_best_metric(args, ["mean", "worst", *tasks])
    if args.metric_for_best_model in tasks:
        args.metric_for_best_model += f"_{tasks[args.metric_for_best_model].score}"
        args.greater_is_better = True  # also if the name of the task ends in "loss"
    rows = {f"{name} {split}": rows for name, task in tasks.items() for split, rows in task.data.items()}
    run = Run(args, data_args, model_args, sharing, rows=DatasetDict(rows))

    # Model
    loaded = {}
    for entry in entries:
        tell(f"\ntask {entry.name} ({entry.recipe})")
        with entry.blamed():
            loaded[entry.name] = tasks[entry.name].model()
            tasks[entry.name].describe_columns(loaded[entry.name].model)
    if model_args.after is not None:
        check_shared(loaded, sharing.own_layers or 0)
    tuned, together = model.combine(loaded, sharing)
    together.model.config.tasks = {entry.name: entry.recipe for entry in entries}  # predict reads it
    trainers = {name: task.trainer(tuned[name]) for name, task in tasks.items()}

    # Trainer
    scores = {name: task.score for name, task in tasks.items()}
    trainer = steps.Trainer(
        model=together,
        args=args,
        trainers=trainers,
        sharing=sharing,
        fixed=[entry.share for entry in entries],
        scores=scores,
        losses={name: of_task.losses["labels"] for name, of_task in trainers.items()},
    )
    if sharing.compare_single:
        single.check(trainer)
    report.print_plan(trainer)

    # Train
    with run.phase("before"):
        before = {name: task.test(trainers[name], None) for name, task in tasks.items()}
        report.check_scores(trainer, before)
    run.train(trainer)
    with run.phase("eval"):
        metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    report.print_training(trainer)
    report.draw(args.folder / "tasks.png", trainer)

    # Test
    with run.phase("test"):
        found = report.test(args.folder, trainers, tasks)
    metrics |= run.save_scores(trainer, "test", {}, report.test_scores(found, before, scores))
    report.print_scores(found, before, scores)

    # Save
    report.write_cards(run, trainer, tasks, found)
    run.publish(
        trainer,
        task="feature-extraction",
        scores=("mean", "worst", *(f"{name}_{score}" for name, score in scores.items())),
        split="test",
        metrics=metrics,
        usage=USAGE.format(folder=args.output_dir),
    )
    report.finish(run, tasks)
    if sharing.compare_single:
        metrics |= single.compare(run, trainer, entries, tasks, found, argv)
    return metrics


if __name__ == "__main__":
    command_line(main)
