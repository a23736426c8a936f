"""Tokenizers that learn their words from captions, and CLIP text encoders."""

import json
import warnings
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.inputs import CAPTION_WORDS, split_words
from sfumato.training.config.schema import TextEncoderConfig
from sfumato.training.models.pretrained import load_part

MOST_WORDS = 20_000
NUM_BASE_TOKENS = 514  # 256 bytes, alone and at a word's end, and two marks
START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(captions: list[str], vocab_size: int, max_length: int) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-level BPE is learned from `captions`.

    All 256 bytes are in the vocabulary, alone and at a word's end, so every text in every script can be encoded.
    """
    blank = CLIPTokenizer(vocab={END: 0, START: 1}, merges=[])
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = blank.backend_tokenizer.normalizer
    learner.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = alphabet + [letter + "</w>" for letter in alphabet]
    # Equally frequent pairs are merged in the order of their letters' ids, so all letters get theirs here: those that the
    # learner meets by itself come in another order in each process.
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocab_size - 2, len(base)), end_of_word_suffix="</w>", special_tokens=base, show_progress=False
    )
    learner.train_from_iterator(captions, trainer)
    vocab, merges = {token: i for i, token in enumerate(base)}, []
    for left, right in json.loads(learner.to_str())["model"]["merges"]:
        merges.append((left, right))
        vocab.setdefault(left + right, len(vocab))
    for mark in (START, END):
        vocab[mark] = len(vocab)
    # The same in every process by now; should another learner break ties at random, all use the first one's tokens.
    vocab, merges = broadcast_object_list([vocab, merges])
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def extend_vocabulary(old: CLIPTokenizer, captions: list[str], extra_vocab: int, max_length: int) -> CLIPTokenizer:
    """A trained model's tokenizer with at most `extra_vocab` further tokens, learned from those `captions` with words that the
    model does not know.

    Words that it knows keep their tokens, and so do those `captions` that have no other words: what it draws for them stays
    the same until it is trained. (Scripts without spaces are read in whole runs, so a known character may be read together
    with an unknown one next to it.)

    Args:
        max_length: of captions from now on, in tokens, if they need more than the model's own.

    Raises:
        ValueError: the tokenizer does not say which words its model knows.
    """
    words = old.init_kwargs.get(CAPTION_WORDS)
    if not words:
        raise ValueError("text_encoder.extra_vocab: the tokenizer of init_from does not say which words its model knows")
    known = set(words)
    new_captions = [caption for caption in captions if not known.issuperset(split_words(caption))]
    old_captions = [caption for caption in captions if known.issuperset(split_words(caption))]
    vocab, merges = _vocabulary(old)
    protected = set(merges)
    for tokens in map(old.tokenize, [*words, *old_captions]):
        protected.update(zip(tokens, tokens[1:]))  # a merge of these would change what the model knows
    further = _vocabulary(train_tokenizer(new_captions, NUM_BASE_TOKENS + extra_vocab, max_length))[1]
    for left, right in further:
        if (left, right) not in protected and left in vocab and right in vocab and left + right not in vocab:
            merges.append((left, right))
            vocab[left + right] = len(vocab)
    longest = max(map(len, CLIPTokenizer(vocab=vocab, merges=merges)(captions, verbose=False).input_ids), default=0)
    length = max(old.model_max_length, min(longest, max_length))
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)
    tokenizer.init_kwargs[CAPTION_WORDS] = words
    return tokenizer


def _vocabulary(tokenizer: CLIPTokenizer) -> tuple[dict[str, int], list[Any]]:
    """Token ids and merges."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return dict(model["vocab"]), [(left, right) for left, right in model["merges"]]


def fit_text_encoder(encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
    """Fit a text encoder to a tokenizer that has grown: new embeddings are random, with the old ones' standard deviation."""
    embeddings = getattr(encoder, "text_model", encoder).embeddings
    tokens, places = len(tokenizer), tokenizer.model_max_length
    if tokens > embeddings.token_embedding.num_embeddings:
        embeddings.token_embedding = _longer(embeddings.token_embedding, tokens)
        encoder.config.vocab_size = tokens
    if places > embeddings.position_embedding.num_embeddings:
        embeddings.position_embedding = _longer(embeddings.position_embedding, places)
        embeddings.register_buffer("position_ids", torch.arange(places).expand((1, -1)), persistent=False)
        encoder.config.max_position_embeddings = places


def _longer(embedding: torch.nn.Embedding, rows: int) -> torch.nn.Embedding:
    """The same rows, followed by random ones."""
    new = torch.nn.Embedding(rows, embedding.embedding_dim)
    old = embedding.weight.detach()
    with torch.no_grad():
        new.weight.normal_(std=float(old.std()))
        new.weight[: len(old)] = old
    return new.requires_grad_(embedding.weight.requires_grad)


def remember_words(tokenizer: CLIPTokenizer, captions: list[str]) -> None:
    """Add all words of `captions` to those already in the tokenizer's settings, which are saved with it.

    They show which words of a prompt are unknown. If there are more than `MOST_WORDS`, none are kept and nothing is reported.
    """
    words = set(tokenizer.init_kwargs.get(CAPTION_WORDS, ()))
    for caption in captions:
        words.update(split_words(caption))
    tokenizer.init_kwargs[CAPTION_WORDS] = sorted(words) if len(words) <= MOST_WORDS else []


def build_text_encoder(
    config: TextEncoderConfig, captions: list[str], tokenizer: CLIPTokenizer | None = None
) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Tokenizer, if not given, and text encoder, with random weights or pretrained (a folder or Hub id with both)."""
    if config.pretrained is not None:
        key, source = "text_encoder.pretrained", config.pretrained
        encoder, whole = load_part(CLIPTextModel, key, source, "text_encoder", dtype=torch.float32)
        try:
            tokenizer = tokenizer or CLIPTokenizer.from_pretrained(source, subfolder="tokenizer" if whole else "")
        except (OSError, ValueError) as error:
            raise ValueError(f"{key}={source!r}: its tokenizer cannot be opened: {error}") from error
        if len(tokenizer) < 256:  # transformers makes an empty one if there is none
            raise ValueError(f"{key}={source!r} has no tokenizer with its text encoder")
    else:
        if tokenizer is None:
            tokenizer = train_tokenizer(captions, config.vocab_size, config.max_length)
            remember_words(tokenizer, captions)
        marks: dict = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=config.hidden_size,
                intermediate_size=4 * config.hidden_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                max_position_embeddings=config.max_length,
                **marks,
            )
        )
        # CLIP's own 0.02 drowns in what attention and MLP add at random, so that words are hardly distinguishable at first;
        # docs/notebook has the figures, to which one text layer and the data's palette contribute too.
        for module in encoder.modules():
            if isinstance(module, torch.nn.Embedding):
                torch.nn.init.normal_(module.weight, std=config.embedding_std)
    train = config.train if config.train is not None else config.pretrained is None
    encoder.requires_grad_(train)
    return tokenizer, encoder.train(train)


def warn_of_long_captions(pipe: SfumatoPipeline, captions: list[str]) -> None:
    """Warn how many captions lose their end to the token limit; nothing is cut silently."""
    limit = pipe.tokenizer.model_max_length
    long = 0
    longest = 0
    for start in range(0, len(captions), 1000):
        lengths = [len(ids) for ids in pipe.tokenizer(captions[start : start + 1000], verbose=False).input_ids]
        long, longest = long + sum(length > limit for length in lengths), max(longest, *lengths)
    if long:
        warnings.warn(
            f"{long} of {len(captions)} captions are longer than {limit} tokens and are cut; "
            f"text_encoder.max_length={longest} would hold them all",
            stacklevel=2,
        )
