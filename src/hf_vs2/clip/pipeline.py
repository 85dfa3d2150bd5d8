"""Zero-shot image classification with steering: transformers' pipeline, with prompts encoded once and answers about
steering."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForZeroShotImageClassification, CLIPModel, PreTrainedModel
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.zero_shot_image_classification import ZeroShotImageClassificationPipeline

from ..data.ahead import num_processors
from ..data.batches import read_pixels
from ..data.images import image_name
from ..data.inputs import DEFAULT_TEMPLATES, SINGLE_IMAGE, NamedImage, NamedImages, named_images
from ..data.labels.prompts import class_embeddings
from ..data.pixels import Normalizer
from ..encoders.families import family_of, is_steerable, refuse_without_texts
from ..encoders.loading import check_clip
from ..encoders.processing import knows_words
from ..encoders.tail import cosine_of, is_sigmoid, logits_of_images, plain_outputs, probabilities
from ..encoders.wrapped import device_of, is_offloaded, unwrapped
from ..explain.explanation import VS2Explanation, check_explainable, explain_rows
from ..files.weight_state import Kept, weights_state
from ..steering.corpus_search import RetrievalInputs
from ..steering.outputs import VS2ImageFeatures
from ..steering.steerer import Steerer
from .answers import Answers
from .modeling import VS2CLIPForZeroShot
from .pipeline_options import OneCall, OptionsMixin


TASK = "vs2-zero-shot-image-classification"

_AUTOMATIC = -1  # `num_workers` that nobody gave
_EXPLAINED = "explanation."  # a batch goes through transformers' pipeline as named tensors


class VS2ZeroShotImageClassificationPipeline(OptionsMixin, ZeroShotImageClassificationPipeline):
    """
    transformers' zero-shot image classification pipeline for [`VS2CLIPForZeroShot`], and for a plain `CLIPModel`.

    Against the stock pipeline, whose scores it gives (to float32 rounding) for the same checkpoint, prompts and opaque
    images:

    - a label set is encoded once, for any number of images and calls, not once a batch;
    - a list or data set is taken in batches without asking, and threads read and resize the next batches meanwhile;
    - labels are read as everywhere in hf_vs2: prompts have a blank for `_` and no numbering (`001.`); `clean=False`
      leaves them;
    - template ensembles, `top_k`, and `candidate_labels` (or any other option) fixed at construction;
    - steering options for one call, which no other user of the model sees;
    - on request what steering did to each image, with plain CLIP's scores beside the steered ones;
    - images as bytes, `{"bytes": ..., "path": ...}` dicts, arrays and `file:` addresses too, read by
      [`~hf_vs2.data.open_image`] as in training, transparency on white; errors that name the image.

    Three ways to it:

    ```python
    >>> import hf_vs2
    >>> classifier = hf_vs2.zero_shot_classifier("user/vs2-or-sae-or-clip")
    >>> classifier = pipeline("vs2-zero-shot-image-classification", model="user/vs2-clip-vit-base-patch32-cifar100")
    >>> classifier = pipeline(
    ...     "zero-shot-image-classification", model=..., pipeline_class=VS2ZeroShotImageClassificationPipeline
    ... )
    >>> classifier("cat.png", candidate_labels=["cat", "dog"])
    [{'score': 0.98, 'label': 'cat'}, {'score': 0.02, 'label': 'dog'}]
    ```

    Raises:
        `TypeError`: for another model than these two. `ValueError`: without tokenizer or image processor.
    """

    max_cached_floats = 2**24
    """How many numbers the kept class embeddings may have together (64 MB); the least recently used go first."""

    default_batch_size = 16
    """Images per forward pass where many are given and nobody said how many to take: on a CPU the fastest for
    ViT-B/32."""

    def __init__(self, **kwargs: Any):
        model = kwargs["model"] = unwrapped(kwargs.get("model"))
        if not isinstance(model, VS2CLIPForZeroShot) and not is_steerable(model):
            kind = getattr(getattr(model, "config", None), "model_type", None)
            raise TypeError(
                f"This pipeline runs VS2CLIPForZeroShot and CLIPModel, not {type(model).__name__}"
                f"{f' (model type {kind!r})' if kind else ''}. For other families use transformers' own "
                'pipeline("zero-shot-image-classification").'
            )
        tokenizer, has_texts = kwargs.get("tokenizer"), family_of(getattr(model, "clip", model)).has_texts
        for part in ("tokenizer", "image_processor") if has_texts else ("image_processor",):
            if kwargs.get(part) is None:
                raise ValueError(
                    f"This pipeline needs {part}=; hf_vs2.zero_shot_classifier(model) finds it by itself."
                )
        if tokenizer is not None and not isinstance(tokenizer, Mapping) and not knows_words(tokenizer):
            raise ValueError(
                "This tokenizer knows no words, so that all labels would look alike: transformers makes such a one "
                "where the checkpoint has no tokenizer.json. Save the CLIP's tokenizer there, or give it with "
                "tokenizer=."
            )
        check_clip(getattr(model, "clip", model))
        if is_offloaded(model):
            model.hf_device_map = {"": device_of(model)}  # transformers then leaves the weights where they are
        kwargs.pop("local_files_only", None)  # `pipeline()` has used it and passes it on
        self._prompts: Kept[torch.Tensor] = Kept(self.max_cached_floats, torch.Tensor.numel)
        super().__init__(**kwargs)

    @property
    def core(self) -> PreTrainedModel:
        """The model, also where a wrapped one was put in its place since."""
        return unwrapped(self.model)

    @property
    def clip(self) -> CLIPModel:
        """The CLIP that is run."""
        return getattr(self.core, "clip", self.core)

    def clear_cache(self) -> None:
        """Forget the class embeddings. Only needed after a change that leaves the text tower's weights as they are,
        such as switching an adapter off; changed weights are noticed."""
        self._prompts.clear()

    # The signature is transformers' with `candidate_labels` optional, since they may have been given at construction.
    def __call__(self, image: Any = None, candidate_labels: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """
        Classify one image, or many.

        Args:
            image: a path, address (`http:`, `https:`, `file:`, `data:`), base64 string, encoded bytes,
                `{"bytes": ..., "path": ...}`, a PIL image, or an array or tensor of one image; or a list, tuple or
                `datasets` column of these; or a data set (`KeyDataset`) or any iterable of them, such as a generator.
                `images=` is another name for it, as in transformers.
            candidate_labels (`list[str]`): the labels to choose from.
            hypothesis_template (`str`, *optional*, defaults to `"This is a photo of {}."`): the prompt, as in
                transformers. The same for plain CLIP and for VS2, so that their scores can be compared.
            templates (*optional*): in its place `"single"` (`"a photo of a {}."`, the paper's), `"ensemble"` (OpenAI's
                seven), a file of templates, or a list of them; see [`resolve_templates`].
            clean (`bool`, *optional*, defaults to `True`): read labels by [`clean_class_names`] before they go into
                prompts; answers have them as they were given.
            tokenizer_kwargs (`dict`, *optional*): further arguments of the tokenizer, as in transformers.
            top_k (`int`, *optional*): how many of the best labels to return; all by default.
            steer (`bool`, *optional*): `False` gives plain CLIP, `True` steers a model whose steering is off.
            gamma, lambda_, gate, fvu_threshold, method, num_neighbors, positives, edits (*optional*): see
                [`Steering`]; by default the model's own settings. `gate=None` steers every image. `method="vs2++"`
                needs a checkpoint with a corpus.
            return_details (`bool`, *optional*, defaults to `False`): return for each image a dict instead of the list.
            explain (`bool`, *optional*, defaults to `False`): add to each label's result an `"explanation"`: which
                latents moved its score by how much, as [`VS2Explanation.parts`] gives it. Images are encoded once all
                the same.
            top_latents (`int`, *optional*, defaults to 5): how many latents an explanation lists.
            latent_names (*optional*): names for them, as [`VS2CLIPForZeroShot.explain`] takes them.
            timeout (`float`, *optional*, defaults to 60): seconds for an image from the web, its whole answer.
            batch_size (`int`, *optional*): images per forward pass, here or at construction; scores do not depend on
                it beyond float rounding. By default 16 for images that can be counted (a list, tuple, column or data
                set), and 1 for others: in a stream no answer waits for an image that may come much later. Give it for
                a long generator.
            num_workers (`int`, *optional*): as in every pipeline, processes that read and resize images; 0 reads each
                batch when its turn comes. By default threads read ahead, as many as there are processors to have,
                where images can be counted.

        Returns:
            For one image a list of `{"score": float, "label": str}`, best first; for a list, tuple or column of images
            a list of those; for a data set or another iterable an iterator over them, which reads images as it goes.

            With `return_details=True`, `{"predictions": [...], "plain": [...], "fvu": float or None, "steered": bool,
            "similarity": float}` takes the place of each such list. `plain` holds plain CLIP's scores, and
            `similarity` the cosine of the image with plain CLIP's answer. `fvu` is `None` where steering is
            off, and from methods that do not read the SAE, which give `distance` in its place ([`row_distance`]). With
            several SAEs `fvu` and `steered` are lists, layers ascending.

        Raises:
            `ValueError`: for labels that are missing, empty, given twice or the same to this CLIP (`Cat` and `cat`),
                settings that can't be used, and images that can't be read (then an [`UnreadableImageError`], which
                names the image).
            `TypeError`: for things of another type, and unknown options.
        """
        image = kwargs.pop("images", image)
        if image is None:
            raise ValueError("image is missing: give one, or several.")
        if candidate_labels is not None:
            kwargs["candidate_labels"] = candidate_labels
        elif "candidate_labels" not in self._postprocess_params:
            raise ValueError("candidate_labels is missing: give the list of labels to choose from.")
        # Two classes up: the stock `__call__` insists on labels, and does nothing else.
        call = super(ZeroShotImageClassificationPipeline, self).__call__
        if isinstance(image, SINGLE_IMAGE):
            return call(NamedImage(image), **kwargs)
        images = named_images(image)
        if isinstance(images, NamedImages):
            if kwargs.get("batch_size") is None and self._batch_size is None:
                kwargs["batch_size"] = self.default_batch_size
            if kwargs.get("num_workers") is None and self._num_workers is None:
                kwargs["num_workers"] = _AUTOMATIC
        results = call(images, **kwargs)
        return list(results) if isinstance(image, Sequence) else results

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterable[Any]:
        """transformers' own where its processes read, and for streams; else answers to images that are read ahead."""
        options = preprocess_params, forward_params, postprocess_params
        if num_workers > 0 or not isinstance(inputs, NamedImages):
            # The images of a stream are read one by one, as they come: it may hand out the same object again, changed.
            return super().get_iterator(inputs, num_workers, batch_size, *options)
        return Answers(self, inputs, batch_size, num_processors() if num_workers == _AUTOMATIC else 0, *options)

    def preprocess(self, image: Any, timeout: float | None = None) -> dict[str, Any]:
        """uint8 `(1, channels, height, width)`: a quarter of the memory, and normalised on the device; and how
        messages name it."""
        named = image if isinstance(image, NamedImage) else NamedImage(image)
        pixels = read_pixels([named], self.image_processor, timeout)
        return {"pixel_values": pixels, "name": image_name(named.name, named.image)}

    def _forward(
        self,
        model_inputs: dict[str, Any],
        candidate_labels: tuple[str, ...],
        templates: tuple[str, ...] = DEFAULT_TEMPLATES,
        steering: Mapping[str, Any] | None = None,
        return_details: bool = False,
        explain: bool = False,
        clean: bool = True,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        call: OneCall | None = None,
    ) -> dict[str, torch.Tensor | None]:
        call = call or OneCall()
        if call.classes is None:
            call.classes = self._classes(candidate_labels, templates, clean, tokenizer_kwargs or {})
            if isinstance(self.core, VS2CLIPForZeroShot):
                # The model itself is never set to this call's options, so nobody else sees them.
                call.steerer = self.core.steerer.with_(**steering or {}).for_one_call()
        classes, steerer = call.classes, call.steerer
        pixels = model_inputs["pixel_values"]
        pixels = Normalizer(self.image_processor, pixels.device)(pixels).to(self.clip.dtype)
        names = model_inputs.get("name", "the image")
        name = ([names] if isinstance(names, str) else names).__getitem__
        images, logits, explanation = self._image_features(pixels, classes, steerer, return_details, explain, name)
        outputs: dict[str, torch.Tensor | None] = {"logits": logits}
        if return_details:
            outputs |= {
                "plain_logits": self._logits(images.plain_features, classes, name),
                "fvu": images.fvu,
                "distance": images.distance,
                "steered": images.steered,
            }
        if explanation is not None:
            outputs |= {_EXPLAINED + name: getattr(explanation, name) for name in VS2Explanation.tensor_fields}
        return outputs

    def _classes(
        self, labels: tuple[str, ...], templates: tuple[str, ...], clean: bool, tokenizer_kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """[`class_embeddings`] of labels and templates, kept for as long as text tower and tokenizer stay as they are.
        A change that leaves the weights alone (switching an adapter off) is not seen."""
        if isinstance(self.tokenizer, Mapping):  # which holds them
            return class_embeddings(self.clip, self.tokenizer, labels, clean=clean)
        refuse_without_texts(self.clip)
        projection = getattr(self.clip, "text_projection", nn.Identity())  # SigLIP's is a part of the text model
        weights = weights_state([*self.clip.text_model.parameters(), *projection.parameters()])
        make = partial(class_embeddings, clean=clean, tokenizer_kwargs=tokenizer_kwargs, by_length=True)
        return self._prompts.get(
            (weights, self.tokenizer),
            (labels, templates, clean, repr(sorted(tokenizer_kwargs.items()))),
            lambda: make(self.clip, self.tokenizer, labels, templates),
        )

    def _image_features(
        self,
        pixel_values: torch.Tensor,
        classes: torch.Tensor,
        steerer: Steerer | None,
        with_plain: bool,
        explain: bool,
        name: Callable[[int], str],
    ) -> tuple[VS2ImageFeatures, torch.Tensor, VS2Explanation | None]:
        if steerer is None:
            features = plain_outputs(self.clip, pixel_values=pixel_values).pooler_output
            nothing = torch.zeros(len(features), dtype=torch.bool, device=features.device)
            images = VS2ImageFeatures(features, steered=nothing, plain_features=features)
            return images, self._logits(features, classes, name), None
        if not explain:
            images = steerer.features(pixel_values, with_plain, RetrievalInputs(class_embeds=classes))
            return images, steerer.class_logits(images, classes, name), None
        check_explainable(steerer)
        rows = self.core.cls_rows(pixel_values)
        images = steerer.features_from_cls(rows, class_embeds=classes)
        if with_plain:
            images.plain_features = steerer.with_(enabled=False).features_from_cls(rows).features
        explanation = explain_rows(steerer, rows, classes, None, {}, RetrievalInputs(), name)
        return images, steerer.class_logits(images, classes, name), explanation

    def _logits(self, features: Any, classes: torch.Tensor, name: Callable[[int], str]) -> torch.Tensor:
        """Float32 logits `(batch, num_classes)`, also of a model in half precision."""
        return logits_of_images(self.clip, features, lambda embeds: embeds.to(classes.device) @ classes.T, name)

    def _ranked(self, logits: torch.Tensor, labels: Sequence[str], top_k: int | None) -> list[dict[str, Any]]:
        scores = zip(probabilities(logits, self.clip).tolist(), labels, strict=True)
        return [{"score": score, "label": label} for score, label in sorted(scores, key=lambda pair: -pair[0])[:top_k]]

    def postprocess(
        self,
        model_outputs: dict[str, Any],
        candidate_labels: tuple[str, ...],
        top_k: int | None = None,
        return_details: bool = False,
        top_latents: int | None = 5,
        latent_names: Mapping[int, str] | None = None,
    ) -> Any:
        predictions = self._ranked(model_outputs["logits"][0], candidate_labels, top_k)
        if _EXPLAINED + "contributions" in model_outputs:
            tensors = {name: model_outputs[_EXPLAINED + name] for name in VS2Explanation.tensor_fields}
            named: dict[str, Any] = {"labels": candidate_labels, "names": dict(latent_names or {})}
            explanation = VS2Explanation(**tensors, **named, sigmoid=is_sigmoid(self.clip))
            for prediction in predictions:
                parts = explanation.parts(prediction["label"], top=top_latents)
                del parts["label"]
                prediction["explanation"] = parts
        if not return_details:
            return predictions
        fvu = model_outputs["fvu"]
        details = {
            "predictions": predictions,
            "plain": self._ranked(model_outputs["plain_logits"][0], candidate_labels, top_k),
            "fvu": None if fvu is None else fvu[0].tolist(),
            "steered": model_outputs["steered"][0].tolist(),
            "similarity": cosine_of(self.clip, model_outputs["plain_logits"][0].max()).item(),
        }
        if model_outputs.get("distance") is not None:
            details["distance"] = model_outputs["distance"][0].tolist()
        return details


PIPELINE_REGISTRY.supported_tasks.pop(TASK, None)  # a reload of this module is no reason for a warning
PIPELINE_REGISTRY.register_pipeline(
    TASK,
    pipeline_class=VS2ZeroShotImageClassificationPipeline,
    pt_model=AutoModelForZeroShotImageClassification,
    type="multimodal",
)
# With this mark `save_pretrained` would copy this file into the checkpoint and list it as remote code, and from then
# on transformers would refuse the checkpoint without `trust_remote_code=True`.
del VS2ZeroShotImageClassificationPipeline._registered_impl
