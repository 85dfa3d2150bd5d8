"use strict";
// The page of one latent.
(() => {
  const { el, format } = atlas;

  const fact = (value, text) => el("div", { class: "fact" }, el("dt", {}, text), el("dd", {}, value));

  function names(index, latent) {
    if (!index.names || !index.count[latent]) return null;
    const most = Math.max(...index.scores[latent], 0.01);
    return el("section", { class: "panel" }, el("h2", {}, "Names"),
      el("p", { class: "hint" }, "Words that the decoder direction moves an image towards, with the cosine."),
      el("ol", { class: "bars" }, index.names[latent].map((word, at) => bar(index.words[word], format.score(index.scores[latent][at]), index.scores[latent][at] / most))));
  }

  const bar = (text, value, part, note, kind = "") => el("li", { class: `bar-line ${kind}` },
    el("span", { class: "bar-text" }, text), el("span", { class: "bar-track" }, el("span", { class: "bar-fill", style: { "--part": String(Math.max(0, Math.min(1, part))) } })),
    el("span", { class: "bar-value" }, value, note ? el("small", {}, note) : null));

  function classes(index, detail) {
    if (!detail.classes || !detail.classes.length) return null;
    return el("section", { class: "panel" }, el("h2", {}, "Classes"),
      el("p", { class: "hint" }, "Share of a class’s images on which it is active; × is how many times its share among all images."),
      el("ol", { class: "bars" }, detail.classes.map(([number, frequency, lift]) => bar(index.class_names[number], format.percent(frequency), frequency, lift < 0.1 ? "×<0.1" : `×${format.number(lift, 2)}`))));
  }

  function images(index, detail, facts) {
    if (!detail.top.length) return el("section", { class: "panel wide" }, el("h2", {}, "Strongest images"), el("p", { class: "hint" }, "It is active on none of the images in this atlas."));
    const most = Math.max(...detail.top.map(([, value]) => value), 1e-9);
    return el("section", { class: "panel wide" }, el("h2", {}, "Strongest images"),
      el("ul", { class: "photos" }, detail.top.map(([image, value]) => {
        const known = facts[image] || {};
        const label = known.label === undefined ? "" : index.class_names[known.label];
        const changed = known.plain !== undefined && known.plain !== known.steered;
        const verdict = !changed ? null : known.steered === known.label ? "fixed" : known.plain === known.label ? "broken" : null;
        return el("li", {}, el("figure", { class: "photo" },
          atlas.cards.picture(image, label ? `image ${image}, ${label}` : `image ${image}`),
          el("figcaption", {}, el("span", { class: "meter", style: { "--part": String(Math.max(0, value / most)) } }),
            el("span", { class: "photo-text", title: label }, el("b", {}, format.number(value)), label ? ` ${label}` : ` #${image}`),
            verdict && el("span", { class: `verdict ${verdict === "fixed" ? "good" : "bad"}`, title: `${verdict} by steering` }, verdict))));
      })));
  }

  function activations(detail, index, latent) {
    if (!index.count[latent]) return null;
    return el("section", { class: "panel" }, el("h2", {}, "Activations"),
      atlas.charts.histogram(`Histogram of the ${format.whole(index.count[latent])} values that are not 0, from ${format.number(detail.low)} to ${format.number(detail.high)}.`,
        detail.histogram, detail.low, detail.high, { height: 180, xLabel: "value where it is active", yLabel: "% of those images" }));
  }

  function nearest(detail) {
    return el("section", { class: "panel wide" }, el("h2", {}, "Nearest latents"),
      el("p", { class: "hint" }, "By the cosine of the decoder directions."),
      el("ul", { class: "grid small" }, detail.nearest.map(([other, cosine]) => el("li", {}, atlas.cards.card(other), el("span", { class: "cosine" }, `cosine ${format.score(cosine)}`)))));
  }

  async function show(view, latent) {
    const index = atlas.data.latents;
    if (!Number.isInteger(latent) || latent < 0 || latent >= index.share.length) {
      view.replaceChildren(el("h1", { tabindex: -1 }, "No such latent"), el("p", { class: "nothing" }, `This atlas has latents 0 to ${index.share.length - 1}.`));
      return;
    }
    const chunk = await atlas.load(`latents-${String(Math.floor(latent / index.chunk)).padStart(4, "0")}`);
    const detail = chunk.latents[latent - chunk.start];
    const back = el("a", { class: "quiet", href: "#view=latents", id: "back" }, "All latents");
    const step = (by, text) => el("a", { class: "quiet", href: `#latent=${atlas.grid.neighbour(latent, by)}`, rel: by > 0 ? "next" : "prev" }, text);
    view.replaceChildren(
      el("nav", { class: "crumbs", "aria-label": "Latents" }, back, el("span", { class: "spring" }), step(-1, "← previous"), step(1, "next →")),
      el("header", { class: "latent-head" },
        el("p", { class: "eyebrow" }, `Latent ${latent}`),
        el("h1", { tabindex: -1 }, index.count[latent] ? atlas.cards.title(latent) : "Silent"),
        el("dl", { class: "facts" },
          index.scores && index.count[latent] ? fact(format.score(index.scores[latent][0]), "score of the name") : null,
          fact(format.percent(index.share[latent]), "of images"), fact(format.whole(index.count[latent]), index.count[latent] === 1 ? "image" : "images"),
          fact(format.number(index.mean[latent]), "mean where active"), fact(format.number(index.max[latent]), "largest"))),
      el("div", { class: "panels" }, images(index, detail, chunk.images),
        el("div", { class: "stack" }, names(index, latent), activations(detail, index, latent)), classes(index, detail), nearest(detail)));
  }

  atlas.latent = { show, bar };
})();
