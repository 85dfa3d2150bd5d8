"""What a user may rely on whatever steers: one set of properties over all methods of the registry, and over those that
somebody registers from outside the package."""

import copy
import warnings
from types import SimpleNamespace

import numpy as np
import numpy_label_free as reference
import pytest
import torch
from conftest import make_tiny_clip
from numpy_reference import ReferenceSAE, contrastive_direction, keep_norm
from numpy_reference import steer as reference_steer
from recorders import Recorder
from steered import LATENTS, assert_same_output, cls_rows, own_methods, scored_model
from torch.nn.functional import cosine_similarity, normalize
from transformers import CLIPModel

from hf_vs2 import VS2CLIPForZeroShot, measure_statistics
from hf_vs2.encoders.tail import clip_embeds
from hf_vs2.functional.equations import keep_norm as keep_norm_of_rows
from hf_vs2.methods import METHODS, prototypes
from hf_vs2.steering.corpus import RetrievalCorpus


OWN = own_methods()
ALL = [*(name for name, method in METHODS.items() if method.acts), *OWN]
RULES = METHODS | OWN
STEPS = [name for name in ALL if RULES[name].step and not RULES[name].fit]
FITS = [name for name in ALL if RULES[name].fit]
PER_LATENT = tuple(1 + 0.01 * latent for latent in range(LATENTS))
MIXED = tuple(-2 + 0.05 * latent for latent in range(LATENTS))
LABELS = ("a", "b", "c", "d")


@pytest.fixture(scope="module", autouse=True)
def registered():
    METHODS.update(OWN)
    yield
    for name in OWN:
        del METHODS[name]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model with statistics and a corpus, ten fresh images, and four texts that tell the four kinds of images apart as
    badly as a text tower does: of such images every method learns something."""
    kinds, draw = torch.arange(4).repeat(30), lambda *shape, seed: torch.randn(shape, generator=seeded(seed))
    clip, basis = make_tiny_clip(), draw(4, 3, 32, 32, seed=1)
    rows, corpus = (cls_rows(clip, basis[kinds] + 0.7 * draw(120, 3, 32, 32, seed=seed)) for seed in (2, 4))
    pixels = basis[kinds[:10]] + 0.7 * draw(10, 3, 32, 32, seed=3)
    texts = torch.randint(2, 98, (4, 7), generator=seeded(0))
    texts[:, -1] = 98
    with torch.no_grad():
        embeds = normalize(clip_embeds(clip, rows), dim=-1)
        means = torch.stack([embeds[kinds == kind].mean(0) for kind in range(4)]) - embeds.mean(0)
        read = clip.text_model(texts).pooler_output
        clip.text_projection.weight.copy_((torch.linalg.pinv(read) @ (normalize(means, dim=-1) + 0.02)).T)
    folder = tmp_path_factory.mktemp("every") / "clip"
    clip.save_pretrained(folder)
    clip = CLIPModel.from_pretrained(folder)
    model = scored_model(clip, rows)
    model.set_corpus(RetrievalCorpus.from_store(corpus[:40], clip=clip))
    model.set_steering(num_neighbors=6)
    inputs = {"pixel_values": pixels, "input_ids": texts, "attention_mask": torch.ones_like(texts)}
    with torch.no_grad():
        classes = normalize(clip.get_text_features(texts, inputs["attention_mask"]).pooler_output, dim=-1)
    return SimpleNamespace(model=model, clip=clip, inputs=inputs, rows=cls_rows(clip, pixels), classes=classes)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def replayed(model, rows, classes):
    """Image features and logits from cached rows."""
    made = model.image_features_from_cls(rows, class_embeds=classes)
    return made, model.class_logits(made, classes.float())


# The equations


def by_hand(model, rows, classes):
    """What the method in force makes of each row, and its logits: loops over float64, written from the papers alone."""
    clip, sae, known = model.clip, ReferenceSAE.of(model.sae), model.domain_statistics
    settings, norm = model.steering_settings, clip.vision_model.post_layernorm
    rule, W, T = settings.rule, classes.double().numpy(), clip.logit_scale.exp().item()
    g, b, projection = (
        part.detach().double().numpy() for part in (norm.weight, norm.bias, clip.visual_projection.weight)
    )
    pca = [part.double().numpy() for part in known.of_rows]
    z_mean, share = known.latent_mean.double().numpy(), known.latent_frequency.double().numpy()

    def embed(x):
        return reference.unit(projection @ ((x - x.mean()) / np.sqrt(x.var() + norm.eps) * g + b))

    corpus = model.corpus.rows.double().numpy()
    codes, embeds = [sae.encode(x) for x in corpus], np.array([embed(x) for x in corpus])

    def neighbours(x):
        labels, own = (embeds @ W.T).argmax(1), int((embed(x) @ W.T).argmax())
        nearest = np.argsort(-(embeds @ embed(x)))[: settings.num_neighbors]
        counts = [(labels[nearest] == labels[one]).sum() for one in nearest]
        label = own if settings.positives == "query" else labels[nearest[int(np.argmax(counts))]]
        sides = [[codes[one] for one in nearest if (labels[one] == label) == side] for side in (True, False)]
        return keep_norm(x + settings.lambda_ * contrastive_direction(*sides, sae.W_dec, settings.gamma), x)

    def strongest(x):
        c = sae.encode(x)
        return keep_norm(x + settings.lambda_ * (settings.gamma - 1) * c.max() * sae.W_dec[c.argmax()], x)

    def by_paper(name):
        return lambda x: reference_steer(sae, x, name, settings.gamma, settings.lambda_, None, known)

    moves = {METHODS[name].step: by_paper(name) for name in ("vs2", "amplify", "reconstruct", "centroid", "corrected")}
    moves |= {METHODS["vs2++"].step: neighbours, METHODS["own_strongest"].step: strongest, None: lambda x: x}
    moved = [moves[rule.step](x) for x in rows.double().numpy()]
    if rule.fit is None:
        return moved, T * np.array([embed(x) @ W.T for x in moved])
    views = {
        prototypes.PCA: lambda x: reference.pca_view(x, *pca),
        prototypes.SAE: lambda x: reference.latent_view(sae.encode(x), z_mean, share),
    }
    sketch = known.rows.double().numpy()
    E = np.array([embed(moves[rule.step](x)) for x in sketch])
    seen = [np.array([views[view](x) for x in sketch]) for view in rule.views]
    mean, balanced = reference.mean_of(E), reference.balanced_mean(E, W)

    def centred(mean, c=1.0):
        return lambda e, views: reference.distribution_norm(e, W, mean, c)

    def fitted(fit):
        return lambda e, views: reference.prototype_scores(e, fit, views)

    scores = {
        METHODS["distribution_norm"].fit: lambda: centred(mean, settings.coefficient),
        METHODS["full_distribution_norm"].fit: lambda: centred(mean),
        METHODS["balanced_norm"].fit: lambda: centred(balanced),
        METHODS["own_norm"].fit: lambda: centred(0.5 * mean),
        METHODS["prototypes"].fit: lambda: fitted(reference.prototypes(E, W, mean, seen)),
        METHODS["balanced_prototypes"].fit: lambda: fitted(reference.balanced_prototypes(E, W)),
        METHODS["anchored_prototypes"].fit: lambda: anchored(reference.anchored(E, W, T)),
    }

    def anchored(fit):
        assert fit["h"] > 0.5, "it learns nothing of these rows"
        return lambda e, views: reference.anchored_scores(e, W, fit)

    score = scores[rule.fit]()
    given = zip(moved, rows.double().numpy(), strict=True)
    return moved, T * np.array([score(embed(y), [views[view](x) for view in rule.views]) for y, x in given])


CASES = [
    *((method, {}, "relu") for method in ALL),
    *((method, {}, "absolute") for method in ("vs2", "corrected", "vs2++", "prototypes+sae")),
    *((method, {"gamma": PER_LATENT}, "relu") for method in ("vs2", "amplify", "vs2++", "vs2+distribution_norm")),
    ("vs2++", {"positives": "query"}, "absolute"),
    ("vs2+distribution_norm", {"gamma": 4.0}, "relu"),
    ("distribution_norm", {"coefficient": 1}, "relu"),
]


@pytest.mark.parametrize(("method", "settings", "activation"), CASES, ids=lambda value: str(value)[:20])
def test_equals_the_numpy_reference(world, method, settings, activation):
    """From CLS rows to logits: its step, which rows it is fitted to, steered or not, by which mean, with which views."""
    model = world.model
    if activation != "relu":
        model = copy.deepcopy(model)
        model.sae.config.activation = activation
        rows = model.domain_statistics.rows.float()
        model.set_domain_statistics(measure_statistics(model.sae, rows, held_out=torch.arange(20)))
    with torch.no_grad(), model.steering(method=method, **settings):
        rows, logits = by_hand(model, world.rows, world.classes)
        made, found = replayed(model, world.rows, world.classes)
        if RULES[method].step:
            steered = model.steer_cls(world.rows, class_embeds=world.classes)
            np.testing.assert_allclose(steered.rows.numpy(), rows, rtol=1e-3, atol=1e-4)
        if made.fvu is not None:
            sae = ReferenceSAE.of(model.sae)
            expected = [sae.fvu(x) for x in world.rows.double().numpy()]
            np.testing.assert_allclose(made.fvu.numpy(), expected, rtol=1e-4)
    np.testing.assert_allclose(found.numpy(), logits, atol=2e-3)
    with model.steering(enabled=False):
        plain = replayed(model, world.rows, world.classes)[1]
    spread = (found.amax(-1) - found.amin(-1)).mean()
    assert (found - plain).abs().max() > 0.02 * spread, "the method does nothing"


# Plain CLIP, bit for bit


@pytest.mark.parametrize("method", [*ALL, "none"])
def test_switched_off_is_plain_clip_bit_for_bit(world, method):
    """The baseline of every comparison. A last-bit difference can flip a prediction and count as a gain."""
    model, pixels = world.model, world.inputs["pixel_values"]
    with torch.no_grad(), model.steering(method=method, enabled=method == "none"):
        found, expected = model(**world.inputs), world.clip(**world.inputs)
        plain = world.clip.get_image_features(pixels)
        assert_same_output(found, expected)
        assert_same_output(model.get_image_features(pixels, class_embeds=world.classes), plain)
        features = model.image_features(pixels, with_plain=True)
        for made in (features, model.image_features_from_cls(world.rows)):
            assert torch.equal(made.features, plain.pooler_output) and not made.steered.any()
            assert made.fvu is None and made.distance is None
            torch.testing.assert_close(model.class_logits(made, world.classes), expected.logits_per_image)
        assert torch.equal(features.plain_features, plain.pooler_output)
    assert found.fvu is None and found.latent_values is None and not found.steered.any()


@pytest.mark.parametrize("method", ALL)
def test_gated_out_images_are_plain_clip_whatever_else_is_in_the_batch(world, method):
    """The promise of the gate: an image that it holds back has CLIP's own result, beside steered and broken images, in
    any order; and what is steered does not depend on its neighbours in the batch."""
    inputs = world.inputs | {"pixel_values": world.inputs["pixel_values"].clone()}
    inputs["pixel_values"][3] = float("nan")
    model, sae = world.model, world.model.sae
    with torch.no_grad(), model.steering(method=method, gate=0.5):
        for order in (torch.arange(10), torch.randperm(10, generator=seeded(1))):
            batch = {**inputs, "pixel_values": inputs["pixel_values"][order]}
            found, plain = model(**batch), world.clip(**batch)
            kept, whole = ~found.steered, order != 3
            assert 1 < kept.sum() < 10 and kept[~whole].all()
            for name in ("image_embeds", "logits_per_image"):
                assert torch.equal(found[name][kept & whole], plain[name][kept & whole]), name
            assert torch.equal(found.logits_per_text[:, kept & whole], plain.logits_per_text[:, kept & whole])
            changed = (found.logits_per_image[found.steered] - plain.logits_per_image[found.steered]).abs().amax(-1)
            assert (changed > 1e-4).all() and found.logits_per_image[whole].isfinite().all()
        with pytest.raises(ValueError, match="no finite embedding for row 3"):  # an answer, which NaN is not
            replayed(model, cls_rows(world.clip, inputs["pixel_values"]), world.classes)
        for number in (1, 4):
            alone = model(**{**batch, "pixel_values": batch["pixel_values"][number : number + 1]})
            torch.testing.assert_close(
                alone.logits_per_image[0], found.logits_per_image[number], rtol=1e-4, atol=1e-4, equal_nan=True
            )
        # It goes by the FVU where the SAE is read, else by the distance to the training rows.
        made = model.image_features_from_cls(world.rows, class_embeds=world.classes)
        reads = RULES[method].reads_latents
        assert (made.fvu is None, made.latent_values is None, made.distance is None) == (not reads, not reads, reads)
        tau = sae.fvu_threshold(0.5) if reads else model.domain_statistics.distance_threshold(0.5)
        assert torch.equal(made.steered, (made.fvu if reads else made.distance) <= tau)
        scored = model.class_logits(made, world.classes)
    with model.steering(enabled=False):
        plain = replayed(model, world.rows, world.classes)[1]
    assert torch.equal(scored[~made.steered], plain[~made.steered])
    if reads:
        with torch.no_grad(), model.steering(method=method, fvu_threshold=0.0):
            assert_same_output(model(**world.inputs), world.clip(**world.inputs))
            with model.steering(fvu_threshold=float("inf")):
                assert model(**world.inputs).steered.all()


@pytest.mark.parametrize("method", ALL)
def test_a_batch_waits_for_its_answer_once(world, method):
    """On a GPU each question to a tensor stops the queue of work. One is left: whether the answers are finite. Methods
    that look for neighbours ask the corpus besides."""
    with torch.no_grad(), world.model.steering(method=method):
        steerer = world.model.steerer.for_one_call()
        for asked in (Recorder(), Recorder()):  # the first batch of a call fits the labels and asks for the weights
            with asked:
                images = steerer.features(world.inputs["pixel_values"], True, {"class_embeds": world.classes})
                steerer.class_logits(images, world.classes)
    assert len(asked.waits) <= 1 or RULES[method].needs_corpus, asked.waits


@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts what a GPU is waited for")
@pytest.mark.parametrize("method", [name for name in ALL if not RULES[name].needs_corpus])
def test_a_batch_waits_for_a_gpu_once(world, method):
    """The same by CUDA's own count, which sees waits inside operations, too."""
    model, classes = copy.deepcopy(world.model).to("cuda"), world.classes.to("cuda")
    pixels = world.inputs["pixel_values"].to("cuda")
    with torch.no_grad(), model.steering(method=method):
        steerer = model.steerer.for_one_call()
        for mode in ("default", "warn"):  # the first batch of a call fits the labels and asks for the weights
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode(mode)
                try:
                    images = steerer.features(pixels, True, {"class_embeds": classes})
                    steerer.class_logits(images, classes)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
    assert len(waits) <= 1, [str(wait.message) for wait in waits]


@pytest.mark.parametrize("method", ALL)
def test_cached_rows_forward_and_features_agree(world, method):
    """Evaluations run on cached rows, services on images, in any order of the labels: one image has one answer."""
    model, pixels, classes = world.model, world.inputs["pixel_values"], world.classes
    with torch.no_grad(), model.steering(method=method, gate=0.5):
        out = model(**world.inputs)
        features = model.image_features(pixels, with_plain=True, class_embeds=classes)
        stock = model.get_image_features(pixels, class_embeds=classes).pooler_output
        made, logits = replayed(model, world.rows, classes)
        order = torch.tensor([2, 0, 3, 1])
        torch.testing.assert_close(
            replayed(model, world.rows, classes[order])[1], logits[:, order], rtol=1e-4, atol=2e-3
        )
        plain = world.clip(**world.inputs)
        for one in (features, made):
            scored = model.class_logits(one, out.text_embeds)
            torch.testing.assert_close(scored, out.logits_per_image, rtol=1e-5, atol=1e-4)
        if RULES[method].needs_corpus:  # its classes are the prompts it was called with, unless others are given
            assert not torch.equal(model(**world.inputs, class_embeds=-classes).image_embeds, out.image_embeds)
    assert 0 < out.steered.sum() < 10
    assert torch.equal(features.features, made.features) and torch.equal(stock, made.features)
    assert torch.equal(out.vision_model_output.pooler_output, made.features)
    assert torch.equal(features.plain_features, plain.vision_model_output.pooler_output)
    for name in ("steered", "fvu", "distance", "latent_values", "latent_indices"):
        ours, *others = (getattr(one, name) for one in (out, features, made))
        for other in others:
            assert (ours is None and other is None) or torch.equal(ours, other), name
    assert torch.equal(out.logits_per_text, out.logits_per_image.t())
    # Scores are another way to look at the embedding, which is CLIP's own where no step moves it.
    assert torch.equal(out.image_embeds, plain.image_embeds) == (RULES[method].step is None)


# Edits


@torch.no_grad()
@pytest.mark.parametrize("method", ALL)
def test_edits_come_on_top(world, method):
    """Whatever steers: an edited latent has its value by hand, active or not, and the rest of the step is as it was; what
    the gate holds back is left alone."""
    model, rows = world.model, world.rows
    values, indices = model.sae.encode(rows)
    code = torch.zeros(len(rows), LATENTS).scatter(1, indices, values)
    latent, silent = int((code != 0).sum(0).argmax()), int((code == 0).all(0).nonzero()[0])
    decoder = model.sae.W_dec
    with model.steering(method=method):
        step = model.steerer.move(rows, class_embeds=world.classes).step
        start, change = (rows, torch.zeros_like(code)) if step is None else (step.start, torch.zeros_like(code))
        if step is not None and step.change.shape[1]:
            change = change.scatter_add(1, step.latents, step.change)
        for edits, values_by_hand in (
            ({"amplify": {latent: 3.0, silent: 50.0}}, {latent: 3 * code[:, latent], silent: 0 * code[:, silent]}),
            ({"suppress": [latent]}, {latent: 0 * code[:, latent]}),
            ({"set": {latent: 2.5, silent: -1.0}}, {latent: 2.5, silent: -1.0}),
        ):
            by_hand = change.clone()
            for one, value in values_by_hand.items():
                by_hand[:, one] = value - code[:, one]
            expected = start + by_hand @ decoder
            if step is None or step.keeps_norm:
                expected = keep_norm_of_rows(expected, rows)
            with model.editing(**edits):
                torch.testing.assert_close(
                    model.steer_cls(rows, class_embeds=world.classes).rows, expected, rtol=0, atol=1e-4
                )
        with model.steering(gate=0.5, edits={"set": {silent: 4.0}}):
            found = model.steer_cls(rows, class_embeds=world.classes)
            assert found.fvu is not None and 0 < found.steered.sum() < 10
            assert torch.equal(found.rows[~found.steered], rows[~found.steered])
            with model.steering(enabled=False):
                assert_same_output(model(**world.inputs), world.clip(**world.inputs))


# Other precisions, gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["half", "double"])
@pytest.mark.parametrize("method", ALL)
def test_another_precision(world, method, dtype):
    """On GPUs people load bfloat16: close to float32, gated by statistics in float32, and gated images CLIP's own. In
    float64 people check gradients."""
    half = copy.deepcopy(world.model).to(dtype)
    inputs = world.inputs | {"pixel_values": world.inputs["pixel_values"].to(dtype)}
    with torch.no_grad(), world.model.steering(method=method), half.steering(method=method):
        exact, rough = world.model(**world.inputs), half(**inputs)
        assert rough.logits_per_image.dtype == dtype
        same = torch.ones(10, dtype=torch.bool)
        if rough.fvu is not None:
            assert rough.fvu.dtype == torch.float32
            # Rounding may swap two latents of nearly the same size; rows with the same ones must agree.
            same = (rough.latent_indices.sort().values == exact.latent_indices.sort().values).all(dim=1)
            torch.testing.assert_close(rough.fvu[same], exact.fvu[same], rtol=0.05, atol=0.02)
        assert same.sum() >= 3
        assert cosine_similarity(rough.image_embeds.float(), exact.image_embeds)[same].min() > 0.95
        scored = half.class_logits(
            half.image_features(inputs["pixel_values"], class_embeds=world.classes), world.classes
        )
        assert scored.dtype == torch.float32
        spread = (exact.logits_per_image.amax(-1) - exact.logits_per_image.amin(-1)).mean()
        for found in (scored, rough.logits_per_image.float()):
            assert (found - exact.logits_per_image)[same].abs().mean() < 0.2 * spread
        with half.steering(gate=0.5):
            out, plain = half(**inputs), half.clip(**inputs)
    assert 0 < out.steered.sum() < 10
    assert torch.equal(out.logits_per_image[~out.steered], plain.logits_per_image[~out.steered])


def test_gradients_are_the_numerical_ones(world):
    """Adversarial and attribution studies differentiate the steered features with respect to the image."""
    model, rows = copy.deepcopy(world.model).double(), world.rows[:1].double().requires_grad_()
    classes = world.classes.double()
    for method in STEPS:
        with model.steering(method=method):
            moved = lambda x: model.image_features_from_cls(x, class_embeds=classes).features  # noqa: E731
            assert torch.autograd.gradcheck(moved, rows, atol=1e-4, fast_mode=True), method


@pytest.mark.parametrize("method", ALL)
def test_what_inference_mode_kept_can_be_trained_with(world, method):
    """An evaluation inside `torch.inference_mode()` fills what is kept (label sets, the corpus, edits, a gamma for each latent);
    the training step after it saves those tensors for backward, which torch refuses for tensors of that mode."""
    model = copy.deepcopy(world.model)
    gamma = 1.7 if RULES[method].one_direction else PER_LATENT
    model.set_steering(method=method, gamma=gamma, edits={"amplify": {3: 4.0}, "suppress": [9, 5], "set": {7: 2.5}})
    with torch.inference_mode():
        expected = replayed(model, world.rows.clone(), world.classes.clone())[1]
    for _ in range(2):  # the second would go back through a graph that was kept
        rows = world.rows.clone().requires_grad_()
        made = model.image_features_from_cls(rows, class_embeds=world.classes)
        logits = model.class_logits(made, world.classes)
        logits.sum().backward()
        torch.testing.assert_close(logits, expected)
        assert rows.grad.isfinite().all() and model.clip.visual_projection.weight.grad.any()


# Edges, copies, checkpoints


@pytest.mark.parametrize("method", ALL)
def test_no_image_one_image_and_one_label(world, method):
    """A first try with a single image has no variance; an empty batch has no maximum. Neither may be NaN or an error."""
    with world.model.steering(method=method):
        assert replayed(world.model, world.rows[:0], world.classes)[1].shape == (0, 4)
        assert replayed(world.model, world.rows, world.classes[:1])[1].isfinite().all()
    model = copy.deepcopy(world.model)
    model.set_domain_statistics(measure_statistics(model.sae, world.rows[:1]))
    with model.steering(method=method):
        assert replayed(model, world.rows, world.classes)[1].isfinite().all()


@pytest.mark.parametrize(("method", "full"), [(method, bool(place % 2)) for place, method in enumerate(ALL)])
def test_copies_and_checkpoints_give_the_same(world, tmp_path, method, full):
    """One id is enough: weights, settings, edits, statistics, corpus and what was fitted for labels, light or full; and
    so it is for a copy."""
    model = copy.deepcopy(world.model)
    edits = None if RULES[method].fit else {"amplify": {3: 4.0}, "suppress": [9, 5], "set": {7: 2.5}}
    gamma = 1.7 if RULES[method].one_direction else PER_LATENT
    model.set_steering(method=method, gate=0.5, gamma=gamma, lambda_=0.4, coefficient=0.4, edits=edits)
    kept = model.steerer.fit_classes(world.classes, LABELS) if RULES[method].fit else None
    model.save_pretrained(tmp_path, full=full)
    with torch.no_grad():
        expected = model(**world.inputs)
        for other in (copy.deepcopy(model), VS2CLIPForZeroShot.from_pretrained(tmp_path)):
            assert other.steering_settings == model.steering_settings
            assert other.fvu_thresholds == model.fvu_thresholds
            assert torch.equal(other.corpus.rows, model.corpus.rows)
            assert torch.equal(other(**world.inputs).logits_per_image, expected.logits_per_image)
            assert len(other.fitted_label_sets) == (kept is not None)
            for one in other.fitted_label_sets:
                assert (one.labels, one.settings, one.fit.facts) == (LABELS, kept.settings, kept.fit.facts)
                ours, theirs = ((*fit[:5], *fit.views) for fit in (one.fit, kept.fit))
                assert all(map(torch.equal, ours, theirs))


# Explanations


SETTINGS = [
    *((method, {}) for method in ALL),
    *((method, {"edits": {"amplify": {3: 4.0}, "suppress": [5, 9], "set": {7: 2.5, 11: -1.0}}}) for method in ALL),
    *(("vs2", settings) for settings in ({"gamma": MIXED}, {"gamma": -1.0}, {"lambda_": 1e6}, {"lambda_": 0.0})),
    ("vs2", {"gamma": 1.0, "edits": {"set": {7: 2.5}}}),
]


@pytest.fixture(scope="module")
def exact(world):
    """In float64, where the parts must add up to many digits, with a LayerNorm whose weights, biases and eps count."""
    model = copy.deepcopy(world.model)
    norm = model.clip.vision_model.post_layernorm
    norm.eps = 50.0
    with torch.no_grad():
        for part in (norm.weight, norm.bias):
            part.add_(0.3 * torch.randn(part.shape, generator=seeded(4)))
    return model.double().eval()


@pytest.mark.parametrize(("method", "settings"), SETTINGS, ids=lambda value: str(value)[:24])
def test_explanations_add_up_to_the_models_own_scores(exact, world, method, settings):
    """Whoever reads "these latents moved the score by so much" must be able to add it up; where scores are no sums over
    latents there is no explanation that looks like a right one."""
    rule, edits = RULES[method], settings.get("edits")
    model, rows, classes = exact, world.rows.double(), world.classes.double()
    if rule.fit is not None:  # which is kept in float32
        model, rows, classes = world.model, world.rows, world.classes
    as_they_are = rule.fit is not None and rule.step is None and edits is None
    with model.steering(method=method, **settings):
        if not (rule.explains or as_they_are or (edits and rule.fit is None)):
            with pytest.raises(ValueError, match="no sums over latents.*Explain one of .*'vs2'"):
                model.explain_from_cls(rows, classes, LABELS)
            return
        found = model.explain_from_cls(rows, classes, LABELS)
        made, own = replayed(model, rows, classes)
    torch.testing.assert_close(found.steered_scores, own.double(), rtol=0, atol=1e-4)
    if rule.fit is None:  # FVU is float32
        cosines = normalize(made.features, dim=-1) @ classes.T * model.clip.logit_scale.exp()
        torch.testing.assert_close(found.steered_scores, cosines, rtol=0, atol=1e-6)
    with model.steering(enabled=False):
        torch.testing.assert_close(found.plain_scores, replayed(model, rows, classes)[1].double(), rtol=0, atol=1e-4)
    total = found.plain_scores + found.normalisation + found.replacement + found.contributions.sum(-1)
    torch.testing.assert_close(total, found.steered_scores, rtol=0, atol=1e-9)
    for label in ("b", 2):  # and the plain numbers made of them, however many latents are listed
        for options in ({}, {"raw": True}, {"against": "d"}):
            parts = found.parts(label, 1, 3, **options)
            listed = sum(one["contribution"] for one in parts["latents"])
            sums = parts["plain"] + parts["normalisation"] + parts["replacement"] + parts["others"] + listed
            assert sums == pytest.approx(parts["steered"], abs=1e-9)
    silent = as_they_are or settings.get("lambda_") == 0
    assert found.steered.all() and silent == (not found.contributions.any())
    assert all(len(set(row.tolist())) == len(row) for row in found.latent_indices)
    if rule.needs_corpus:
        moved_only = (found.latent_values == 0) & (found.latent_changes != 0)
        assert moved_only.any(), "no latent of a neighbour alone"


@pytest.mark.parametrize("method", [name for name in ALL if RULES[name].explains or name in FITS])
def test_images_left_alone_are_explained_by_nothing(world, method):
    """An explanation must not blame latents for an image that the gate held back, or where steering is off."""
    model, rule = world.model, RULES[method]
    if rule.fit and rule.step:
        return
    with model.steering(method=method, gate=0.5):
        found = model.explain_from_cls(world.rows, world.classes, LABELS)
        assert 0 < found.steered.sum() < 10
        left = ~found.steered
        for name in ("contributions", "normalisation", "replacement", "latent_changes"):
            assert not getattr(found, name)[left].any(), name
        assert torch.equal(found.plain_scores[left], found.steered_scores[left])
        image = int(left.nonzero()[0])
        assert found.top(0, image=image) == [] and found.to_dict()[image]["steered"] is False
        with model.steering(enabled=False):
            off = model.explain_from_cls(world.rows, world.classes, LABELS)
        assert model.explain_from_cls(world.rows[:0], world.classes).to_dict() == []
    assert not off.steered.any() and torch.equal(off.plain_scores, off.steered_scores)
    torch.testing.assert_close(off.plain_scores, found.plain_scores, rtol=0, atol=0)
