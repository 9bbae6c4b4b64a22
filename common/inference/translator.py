"""Translate texts of any length with a saved model."""

from transformers import PretrainedConfig

from common.data.language_codes import Direction, set_direction
from common.data.sentences import joined, pieces
from common.data.source import Row
from common.errors import InputError
from common.inference.generation import Generator
from common.models.load import load_config, resolve_model


class Translator(Generator):
    """Load a saved model and translate texts of any length.

    `source_lang` and `target_lang` select one of the pairs that the model was trained on. `Generator` documents the
    other arguments.
    """

    def __init__(self, model: str, *args, source_lang: str | None = None, target_lang: str | None = None, **kwargs):
        config = load_config(resolve_model(model))
        directions = saved_directions(config)
        if not directions:
            raise InputError(f"{model}: has no languages; name a folder of a trained model that translates")
        self.direction = pick(directions, source_lang, target_lang)
        super().__init__(model, *args, **kwargs | {"prefix": self.direction.source_prefix})
        set_direction(self.tokenizer, self.model, self.direction)

    def __call__(self, texts: list[str], n_best: int = 1) -> list[list[Row]]:
        """Return the `n_best` translations of each text, best first: `predicted`, `score`, `pieces` and `ended`.

        For a text in several pieces, translation n joins translation n of each piece.
        """
        self.check_n_best(n_best)
        cut = [pieces(text, self.fits) for text in texts]
        flat = [piece for of_text in cut for piece, _ in of_text]
        outputs = iter(self.best(flat, n_best))
        results = []
        for of_text in cut:
            of_pieces = [next(outputs) for _ in of_text]  # pieces x n_best x (text, log-probability, tokens, ended)
            options = []
            for rank in range(n_best):
                best = [piece[rank] for piece in of_pieces]
                options.append(
                    {
                        "predicted": joined([text for text, *_ in best], of_text),
                        "score": round(sum(total for _, total, *_ in best) / max(1, sum(n for *_, n, _ in best)), 4),
                        "pieces": len(of_text),
                        "ended": all(ended for *_, ended in best),
                    }
                )
            results.append(options)
        return results


def pick(directions: list[Direction], source_lang: str | None, target_lang: str | None) -> Direction:
    """Return the direction with these languages; None matches any language.

    Raises:
        InputError: no direction matches, or several match.
    """
    matches = [d for d in directions if source_lang in (None, d.source_lang) and target_lang in (None, d.target_lang)]
    if len(matches) == 1:
        return matches[0]
    known = ", ".join(f"{d.source_lang}-{d.target_lang}" for d in matches or directions)
    named = [f"--{name} {x}" for name, x in (("source_lang", source_lang), ("target_lang", target_lang)) if x]
    if matches:
        raise InputError(
            f"{' '.join(named) or '--target_lang'}: matches several pairs of the model; choose one of: {known}"
        )
    raise InputError(f"{' '.join(named)}: the model was not trained on this pair; choose one of: {known}")


def saved_directions(config: PretrainedConfig) -> list[Direction]:
    """Return the directions that training saved in a configuration, under the name of its recipe; empty without."""
    names = set(Direction.__dataclass_fields__)
    for value in vars(config).values():
        if isinstance(value, list) and value and all(isinstance(v, dict) and v.keys() == names for v in value):
            return [Direction(**direction) for direction in value]
    return []
