"use strict";
// The page of one latent.
(() => {
  const { el, format } = atlas;

  const fact = (value, text) => el("div", { class: "fact" }, el("dt", {}, text), el("dd", {}, value));
  const panel = (title, hint, wide, ...children) => el("section", { class: `panel${wide ? " wide" : ""}` }, el("h2", {}, title), hint ? el("p", { class: "hint" }, hint) : null, children);

  const bar = (text, value, part, note, kind = "") => el("li", { class: `bar-line ${kind}` },
    el("span", { class: "bar-text" }, text), el("span", { class: "bar-track" }, el("span", { class: "bar-fill", style: { "--part": String(Math.max(0, Math.min(1, part))) } })),
    el("span", { class: "bar-value" }, value, note ? el("small", {}, note) : null));

  /** A bar to the right of a middle line for a gain, to the left for a loss; `most` fills a half. */
  const twoWay = (value, most) => el("span", { class: "two-way" }, el("span", { class: `gain-bar ${value < 0 ? "loss" : "gain"}`, style: { "--part": String(Math.abs(value) / most) } }));

  function names(index, detail, latent) {
    if (!index.count[latent]) return null;
    const line = (word, score) => bar(index.words[word] || word, format.score(score), score, null, score < index.floor ? "faint" : "");
    return panel("Words", null, false,
      el("p", { class: "hint" }, `The decoder direction moves an image towards these words; the bar is the cosine, full at 1. Below ${format.score(index.floor)} (grey) a word is no nearer than to a direction without meaning.`),
      el("ol", { class: "bars" }, index.names[latent].map((word, at) => line(word, index.scores[latent][at]))),
      el("h3", {}, "It moves away from"),
      el("ol", { class: "bars" }, detail.away.map(([word, score]) => line(word, score))));
  }

  function classes(index, detail) {
    if (!detail.classes || !detail.classes.length) return null;
    return panel("Classes", "Share of a class’s images on which it is active; × is how many times its share among all images.", false,
      el("ol", { class: "bars" }, detail.classes.map(([number, frequency, lift]) => bar(index.class_names[number], format.percent(frequency), frequency, lift < 0.1 ? "×<0.1" : `×${format.number(lift, 2)}`))));
  }

  function effect(index, detail) {
    const part = detail.effect;
    if (!part) return null;
    const facts = atlas.data.overview.facts;
    const most = Math.max(...part.classes.map(([, points]) => Math.abs(points)), 0.01);
    const changed = part.changes.reduce((sum, [, , number]) => sum + number, 0);
    const pairs = part.changes.map(([before, after, number]) => `${index.class_names[before]} → ${index.class_names[after]} on ${number}`).join(", ");
    return panel("What steering with it alone does", `Mean change of a class’s probability in points, on the ${format.whole(part.images)} images of this page (gamma ${typeof facts.gamma === "number" ? format.number(facts.gamma) : facts.gamma}, lambda ${format.number(facts.lambda)}).`, false,
      el("ol", { class: "bars" }, part.classes.map(([number, points]) => el("li", { class: "bar-line" }, el("span", { class: "bar-text" }, index.class_names[number]), twoWay(points, most),
        el("span", { class: "bar-value" }, el("b", { class: points < 0 ? "bad-text" : "good-text" }, format.points(points)))))),
      el("p", { class: "hint after" }, changed ? `The answer changes on ${changed} of them: ${pairs}.` : "The answer changes on none of them."));
  }

  function photo(index, facts, [image, value], most) {
    const known = facts[image] || {};
    const label = known.label === undefined ? "" : index.class_names[known.label];
    const changed = known.plain !== undefined && known.plain !== known.steered;
    const verdict = !changed ? null : known.steered === known.label ? "fixed" : known.plain === known.label ? "broken" : null;
    return el("li", {}, el("figure", { class: "photo" },
      atlas.cards.linked(image, label ? `image ${image}, ${label}` : `image ${image}`),
      el("figcaption", {}, el("span", { class: "meter", style: { "--part": String(Math.max(0, value / most)) } }),
        el("span", { class: "photo-text", title: label }, el("b", {}, format.number(value)), label ? ` ${label}` : ` #${image}`),
        verdict && el("span", { class: `verdict ${verdict === "fixed" ? "good" : "bad"}` }, `${verdict} by steering`))));
  }

  function images(index, detail, facts) {
    if (!detail.top.length) return panel("Strongest images", "It is active on none of the images in this atlas.", true);
    const most = Math.max(...detail.top.map(([, value]) => value), 1e-9);
    return panel("Strongest images", "With the latent’s value. A click opens the page of an image.", true, el("ul", { class: "photos" }, detail.top.map((one) => photo(index, facts, one, most))));
  }

  function intervals(index, detail, facts) {
    if (!detail.top.length) return null;
    const step = (detail.high - detail.low) / detail.intervals.length;
    const total = detail.intervals.reduce((sum, [number]) => sum + number, 0);
    const most = Math.max(detail.high, 1e-9);
    const rows = detail.intervals.map(([number, some], at) => el("li", { class: "interval" },
      el("p", {}, el("b", {}, `${format.number(detail.low + at * step, 2)} to ${format.number(detail.low + (at + 1) * step, 2)}`), el("small", {}, `${format.whole(number)} ${number === 1 ? "image" : "images"}, ${format.percent(number / total)} of those it is active on`)),
      el("ul", { class: "photos" }, some.map((one) => photo(index, facts, one, most))))).reverse();
    return panel("Examples by value", "Drawn at random from each quarter of its values: the strongest images alone flatter a latent.", true, el("ol", { class: "intervals" }, rows));
  }

  function activations(detail, index, latent) {
    if (!index.count[latent]) return null;
    return panel("Values", null, false,
      atlas.charts.histogram(`Histogram of the ${format.whole(index.count[latent])} values that are not 0, from ${format.number(detail.low)} to ${format.number(detail.high)}.`,
        detail.histogram, detail.low, detail.high, { height: 180, xLabel: "value where it is active", yLabel: "% of those images" }));
  }

  const neighbours = (title, hint, pairs) => panel(title, hint, true,
    el("ul", { class: "grid small" }, pairs.map(([other, text]) => el("li", {}, atlas.cards.card(other), el("span", { class: "cosine" }, text)))));

  async function show(view, latent) {
    const index = atlas.data.latents;
    if (!Number.isInteger(latent) || latent < 0 || latent >= index.share.length) {
      view.replaceChildren(el("h1", { tabindex: -1 }, "No such latent"), el("p", { class: "nothing" }, `This atlas has latents 0 to ${index.share.length - 1}. `, el("a", { href: "#view=latents" }, "All latents")));
      return;
    }
    const chunk = await atlas.load(`latents-${String(Math.floor(latent / index.chunk)).padStart(4, "0")}`);
    const detail = chunk.latents[latent - chunk.start];
    const back = el("a", { class: "quiet", href: "#view=latents", id: "back" }, "All latents");
    const step = (by, text) => el("a", { class: "quiet", href: `#latent=${atlas.grid.neighbour(latent, by)}`, rel: by > 0 ? "next" : "prev" }, text);
    const together = (number) => `both on ${format.whole(number)} images, ${format.percent(number / index.count[latent])} of its own`;
    view.replaceChildren(
      el("nav", { class: "crumbs", "aria-label": "Latents" }, back, el("span", { class: "spring" }), step(-1, "← previous"), step(1, "next →")),
      el("header", { class: "latent-head" },
        el("p", { class: "eyebrow" }, `Latent ${latent}`),
        el("h1", { tabindex: -1 }, index.count[latent] ? atlas.cards.called(latent) : "Silent"),
        el("dl", { class: "facts" },
          atlas.cards.nameOf(latent) ? fact(format.score(index.scores[latent][0]), "score of the name") : null,
          fact(format.percent(index.share[latent]), "of the images it is active on"), fact(format.whole(index.count[latent]), index.count[latent] === 1 ? "image" : "images"),
          fact(format.number(index.mean[latent]), "mean value where active"), fact(format.number(index.max[latent]), "largest value"))),
      el("div", { class: "panels" }, images(index, detail, chunk.images),
        el("div", { class: "stack" }, names(index, detail, latent), activations(detail, index, latent)),
        el("div", { class: "stack" }, classes(index, detail), effect(index, detail)),
        intervals(index, detail, chunk.images),
        detail.companions.length ? neighbours("Fire together", "Latents that are active on the same images more often than chance gives.", detail.companions.map(([other, number]) => [other, together(number)])) : null,
        neighbours("Nearest latents", "By the cosine of the decoder directions.", detail.nearest.map(([other, cosine]) => [other, `cosine ${format.score(cosine)}`]))));
  }

  atlas.latent = { show, fact, panel, twoWay };
})();
