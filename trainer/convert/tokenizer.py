"""LLaMA's sentencepiece model as a fast tokenizer that gives the published ids.

The published code used the slow tokenizer of transformers 4.31: text is cut at the added tokens, stripped beside them,
and every piece is encoded on its own, with its own leading "_". `PublishedTokenizer` is that in Python; a test holds
this one against it.
"""

import re
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from minigpt5_core.errors import BadInputError
from minigpt5_core.vokens import IMAGE_HERE, voken_strings

SPACE = "\u2581"
BPE = 2  # sentencepiece's numbers: of the model, and of the kinds of pieces
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4


def fast_tokenizer(file: Path, vokens: int, context: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a sentencepiece BPE model, with `vokens` vokens and `<ImageHere>` behind its vocabulary.

    Raises BadInputError for a file that is none.
    """
    model = _read(file)
    pieces = list(model.pieces)
    own = [piece.piece for piece in pieces if piece.type == USER_DEFINED]
    unknown = next(piece.piece for piece in pieces if piece.type == UNKNOWN)
    backend = Tokenizer(
        models.BPE(
            {piece.piece: index for index, piece in enumerate(pieces)},
            _merges(pieces),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=model.trainer_spec.byte_fallback,
            ignore_merges=bool(own),  # a user's own piece is one token and no product of merges
        )
    )
    backend.normalizer = _normalizer(model.normalizer_spec)
    if own:
        symbols = "|".join(re.escape(symbol) for symbol in sorted(own, key=len, reverse=True))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(symbols), "isolated")
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _add_special(backend, pieces, vokens)
    names = {piece.piece for piece in pieces}
    bos, eos = (name if name in names else None for name in ("<s>", "</s>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=eos,
        unk_token=unknown,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def _read(file: Path) -> sentencepiece_model_pb2.ModelProto:
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
    except OSError as error:
        raise BadInputError(
            f"{file} cannot be read: {error.strerror}. Copy LLaMA's tokenizer.model there."
        ) from error
    except Exception as error:  # protobuf's own, which has no public name in every version
        raise BadInputError(f"{file} is no sentencepiece model; give LLaMA's tokenizer.model.") from error
    if model.trainer_spec.model_type != BPE or not model.pieces:
        raise BadInputError(f"{file} is no BPE model of sentencepiece; give LLaMA's tokenizer.model.")
    return model


def _merges(pieces: list) -> list[tuple[str, str]]:
    """Pairs of pieces in the order in which sentencepiece joins them: the best scored product first."""
    index = {piece.piece: number for number, piece in enumerate(pieces) if piece.type == NORMAL}
    merges = []
    for name, number in index.items():
        pairs = [(name[:cut], name[cut:]) for cut in range(1, len(name))]
        pairs = [pair for pair in pairs if pair[0] in index and pair[1] in index]
        pairs.sort(key=lambda pair: (index[pair[0]], index[pair[1]]))
        merges += [(-pieces[number].score, pair) for pair in pairs]
    return [pair for _, pair in sorted(merges, key=lambda merge: merge[0])]


def _normalizer(spec: sentencepiece_model_pb2.NormalizerSpec) -> normalizers.Sequence:
    steps: list = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _add_special(backend: Tokenizer, pieces: list, vokens: int) -> None:
    """`<s>` and its like as they are written; white space beside an added token belongs to it."""
    own = [piece.piece for piece in pieces if piece.type in (UNKNOWN, CONTROL)]
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in own])
    added = [*voken_strings(vokens), IMAGE_HERE]
    backend.add_special_tokens(
        [AddedToken(name, normalized=False, special=True, lstrip=True, rstrip=True) for name in added]
    )
