"use strict";
// A latent as a card, and its images.
(() => {
  const { el, format } = atlas;

  const thumbnail = (image) => `thumbs/${String(Math.floor(image / 1000)).padStart(4, "0")}/${image}.jpg`;

  /** An image that is fetched when it comes near the window. */
  function picture(image, alt) {
    const node = el("img", { src: thumbnail(image), alt, loading: "lazy", decoding: "async", width: 96, height: 96 });
    // A few pixels enlarged are sharper as the squares that they are.
    node.addEventListener("load", () => { if (node.naturalWidth < 64) node.classList.add("pixels"); });
    return node;
  }

  /** First name of a latent, or nothing. */
  function nameOf(latent) {
    const index = atlas.data.latents;
    return index.names && index.count[latent] ? index.words[index.names[latent][0]] : "";
  }

  const title = (latent) => nameOf(latent) || `Latent ${latent}`;

  /** One line about a latent, for screen readers and tooltips. */
  function about(latent) {
    const index = atlas.data.latents;
    if (!index.count[latent]) return `Latent ${latent}, silent`;
    const parts = [`Latent ${latent}`];
    if (index.names) parts.push(`${nameOf(latent)} (${format.score(index.scores[latent][0])})`);
    parts.push(`active on ${format.percent(index.share[latent])} of images`);
    if (index.class) parts.push(`${format.percent(index.frequency[latent])} of ${index.class_names[index.class[latent]]}`);
    return parts.join(", ");
  }

  function card(latent) {
    const index = atlas.data.latents;
    const images = index.images[latent];
    const mosaic = el("span", { class: `mosaic ${images.length ? `n${images.length}` : "empty"}` },
      images.length ? images.map((image) => picture(image, "")) : el("span", { class: "silent" }, "silent"));
    const lines = [
      el("span", { class: "card-head" },
        el("span", { class: "card-name" }, nameOf(latent) || (images.length ? "unnamed" : "silent")),
        index.scores && images.length ? el("span", { class: "score", title: "cosine of the name" }, format.score(index.scores[latent][0])) : null),
      el("span", { class: "card-foot" },
        el("span", { class: "number" }, `#${latent}`),
        el("span", {}, images.length ? format.percent(index.share[latent]) : "0 %")),
    ];
    if (index.class && images.length) {
      lines.splice(1, 0, el("span", { class: "card-class" },
        el("span", { class: "meter", style: { "--part": String(index.frequency[latent]) } }),
        el("span", { class: "card-class-name" }, `${index.class_names[index.class[latent]]} ${format.percent(index.frequency[latent])}`)));
    }
    return el("a", { class: "card", href: `#latent=${latent}`, "aria-label": about(latent), "data-latent": latent }, mosaic, el("span", { class: "card-text" }, lines));
  }

  const cards = (latents) => el("ul", { class: "grid" }, latents.map((latent) => el("li", {}, card(latent))));

  atlas.cards = { about, card, cards, nameOf, picture, title };
})();
