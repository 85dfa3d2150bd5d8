"use strict";
// The page of one image: what the SAE makes of it, and what CLIP answers with and without steering.
(() => {
  const { el, format } = atlas;
  const IMAGES = 500;

  async function show(view, image) {
    const index = atlas.data.latents;
    const overview = atlas.data.overview;
    const none = () => view.replaceChildren(el("h1", { tabindex: -1 }, "No such image"), el("p", { class: "nothing" }, "This atlas shows only the images of its latents and examples. ", el("a", { href: "#view=latents" }, "All latents")));
    if (!overview.image_files.includes(Math.floor(image / IMAGES))) return none();
    const facts = (await atlas.load(`images-${String(Math.floor(image / IMAGES)).padStart(4, "0")}`))[image];
    if (!facts) return none();
    const { fact, panel } = atlas.latent;
    const label = facts.label === undefined ? null : index.class_names[facts.label];
    const threshold = overview.fvu.threshold;
    const gate = threshold === null ? "FVU, no gate" : facts.fvu <= threshold ? `FVU, within the gate’s ${format.number(threshold)}: steered` : `FVU, above the gate’s ${format.number(threshold)}: not steered`;
    const answer = (number, text) => (number === undefined ? null : fact(el("span", { class: number === facts.label ? "good-text" : "bad-text" }, `${index.class_names[number]} ${number === facts.label ? "✓" : "✗"}`), text));
    view.replaceChildren(
      el("nav", { class: "crumbs", "aria-label": "Latents" }, el("a", { class: "quiet", href: "#view=latents", id: "back" }, "All latents")),
      el("header", { class: "latent-head image-head" }, atlas.cards.picture(image, label ? `image ${image}, ${label}` : `image ${image}`),
        el("div", {}, el("p", { class: "eyebrow" }, `Image ${format.whole(image)}`), el("h1", { tabindex: -1 }, label || `Image ${format.whole(image)}`),
          el("dl", { class: "facts" }, fact(format.number(facts.fvu), gate), answer(facts.plain, "plain CLIP’s answer"), answer(facts.steered, "answer with steering")))),
      el("div", { class: "panels" },
        panel("Its latents", `The ${facts.code.length} that are active on it, the largest value first.`, true,
          el("ul", { class: "grid small" }, facts.code.map(([latent, value]) => el("li", {}, atlas.cards.card(latent), el("span", { class: "cosine" }, `value ${format.number(value)}`)))))));
    return undefined;
  }

  atlas.image = { show };
})();
