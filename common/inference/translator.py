"""Translate texts of any length with a saved model."""

from common.data.language_codes import Direction, set_direction
from common.data.sentences import joined, pieces
from common.data.source import Row
from common.errors import InputError
from common.inference.generation import Generator
from common.models.load import load_config, resolve_model


class Translator(Generator):
    """A saved model that translates texts of any length in one direction, of `saved_directions`.

    `Generator` documents the other arguments.
    """

    def __init__(self, model: str, direction: Direction, *args, **kwargs):
        self.direction = direction
        super().__init__(model, *args, **kwargs | {"prefix": direction.source_prefix})
        set_direction(self.tokenizer, self.model, direction)

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


def saved_directions(model: str) -> list[Direction]:
    """Return the directions that training saved in the configuration of a model, under the name of its recipe.

    Raises:
        InputError: there are none.
    """
    names = set(Direction.__dataclass_fields__)
    for value in vars(load_config(resolve_model(model))).values():
        if isinstance(value, list) and value and all(isinstance(v, dict) and v.keys() == names for v in value):
            return [Direction(**direction) for direction in value]
    raise InputError(f"{model}: has no languages; name the folder of a model that a recipe trained to translate")
