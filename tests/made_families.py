"""A tiny random model of each family of encoders, with a tokenizer and an image processor of its own kind."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from transformers import CLIPModel, GemmaTokenizer, XLMRobertaTokenizer

import hf_vs2
from hf_vs2.encoders.processing import load_processing


LABELS = ["cat", "dog", "bird"]
WORDS = ["▁a", "▁photo", "▁of", "▁cat", "▁dog", "▁bird", "▁This", "▁is", ".", "▁", *"abcdefghijklmnopqrstuvwxyz"]
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION = {**TOWER, "image_size": 32, "patch_size": 8}
TEXT = {**TOWER, "vocab_size": 60, "max_position_embeddings": 40}
SQUARE = {"height": 32, "width": 32}


def roberta_words(**settings: Any) -> XLMRobertaTokenizer:
    special = [(word, 0.0) for word in ("<s>", "<pad>", "</s>", "<unk>")]
    return XLMRobertaTokenizer(vocab=[*special, *((word, -1.0) for word in WORDS), ("<mask>", 0.0)])


def gemma_words() -> GemmaTokenizer:
    vocab = {word: place for place, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *WORDS, "<mask>"])}
    merges = [(left, right) for left in vocab for right in vocab if left + right in vocab]
    return GemmaTokenizer(vocab=vocab, merges=merges, model_input_names=["input_ids"])


def bert_words() -> transformers.BertTokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "cat", "dog", "bird", "this", "is", "."]
    return transformers.BertTokenizer(vocab={word: place for place, word in enumerate(words)})


def clip_words() -> Any:
    return load_processing(hf_vs2.__path__[0] + "/demo_assets")[0]


def clip_images() -> Any:
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE)


def demo_clip() -> CLIPModel:
    return CLIPModel.from_pretrained(hf_vs2.__path__[0] + "/demo_assets", dtype=torch.float32)


def made(name: str, text: dict[str, Any], **settings: Any) -> Any:
    """`made("AltCLIP", ...)`: a random model of that name."""
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=VISION, **settings)
    return getattr(transformers, f"{name}Model")(config)


def dual(vision: Any) -> Any:
    bert = transformers.BertConfig(**TEXT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision, bert, projection_dim=24)
    return transformers.VisionTextDualEncoderModel(config)


class Made(NamedTuple):
    """How a tiny random model of a family is made, and what belongs to it."""

    model: Callable[[], Any]
    tokenizer: Callable[[], Any] | None
    images: Callable[[], Any]
    model_type: str


ENDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
SIGLIP_ENDS = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
CLIP_ENDS = {"bos_token_id": 578, "eos_token_id": 579, "pad_token_id": 579}
MADE = {
    "clip": Made(demo_clip, clip_words, lambda: load_processing(hf_vs2.__path__[0] + "/demo_assets")[1], "clip"),
    "metaclip_2": Made(
        lambda: made("MetaClip2", TEXT | ENDS, projection_dim=24), roberta_words, clip_images, "metaclip_2"
    ),
    "altclip": Made(
        lambda: made("AltCLIP", TEXT | ENDS | {"project_dim": 28}, projection_dim=24),
        roberta_words,
        clip_images,
        "altclip",
    ),
    "chinese_clip": Made(
        lambda: made("ChineseCLIP", TEXT, projection_dim=24),
        bert_words,
        lambda: transformers.ChineseCLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE),
        "chinese_clip",
    ),
    # Images larger than the position embeddings are made for, as in the repositories of CLIPSeg.
    "clipseg": Made(
        lambda: made("CLIPSeg", TEXT | {"vocab_size": 580} | CLIP_ENDS, projection_dim=24),
        clip_words,
        lambda: transformers.ViTImageProcessorPil(size={"height": 48, "width": 48}),
        "clipseg",
    ),
    "siglip": Made(
        lambda: made("Siglip", TEXT | {"max_position_embeddings": 64, "projection_size": 32} | SIGLIP_ENDS),
        gemma_words,
        lambda: transformers.SiglipImageProcessorPil(size=SQUARE),
        "siglip",
    ),
    "vit and bert": Made(
        lambda: dual(transformers.ViTConfig(**VISION, hidden_dropout_prob=0.0)),
        bert_words,
        lambda: transformers.ViTImageProcessorPil(size=SQUARE),
        "vision-text-dual-encoder",
    ),
    "clip and bert": Made(
        lambda: dual(transformers.CLIPVisionConfig(**VISION)), bert_words, clip_images, "vision-text-dual-encoder"
    ),
    "clip without texts": Made(
        lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION, projection_dim=24)),
        None,
        clip_images,
        "clip_vision_model",
    ),
    "siglip without texts": Made(
        lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION)),
        None,
        lambda: transformers.SiglipImageProcessorPil(size=SQUARE),
        "siglip_vision_model",
    ),
    **{
        name: Made(
            lambda name=name: transformers.AutoModel.from_config(transformers.AutoConfig.for_model(name, **VISION)),
            None,
            lambda: transformers.BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE),
            name,
        )
        for name in ("dinov2", "dinov2_with_registers", "dinov3_vit", "vit")
    },
}
