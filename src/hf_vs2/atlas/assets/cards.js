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

  /** A picture that opens the page of its image. */
  const linked = (image, alt) => el("a", { class: "to-image", href: `#image=${image}` }, picture(image, alt));

  /** The name of a latent; nothing where its best word scores no more than chance gives, or the latent is silent. */
  function nameOf(latent) {
    const index = atlas.data.latents;
    return index.count[latent] && index.scores[latent][0] >= index.floor ? index.words[index.names[latent][0]] : "";
  }

  /** The name, or in grey that there is none and which word is nearest. */
  function called(latent) {
    const index = atlas.data.latents;
    if (!index.count[latent]) return el("span", { class: "unnamed" }, "silent");
    if (nameOf(latent)) return nameOf(latent);
    if (!index.names[latent].length) return el("span", { class: "unnamed" }, "unnamed");
    return el("span", { class: "unnamed" }, "unnamed ", el("small", {}, `(nearest: ${index.words[index.names[latent][0]]} ${format.score(index.scores[latent][0])})`));
  }

  const title = (latent) => nameOf(latent) || `Latent ${latent}`;

  /** One line about a latent, for tooltips. */
  function about(latent) {
    const index = atlas.data.latents;
    if (!index.count[latent]) return `Latent ${latent}, silent`;
    const parts = [`Latent ${latent}`, nameOf(latent) ? `${nameOf(latent)} (${format.score(index.scores[latent][0])})` : "unnamed"];
    parts.push(`active on ${format.percent(index.share[latent])} of images`);
    if (index.class) parts.push(`${format.percent(index.frequency[latent])} of ${index.class_names[index.class[latent]]}`);
    return parts.join(", ");
  }

  function card(latent) {
    const index = atlas.data.latents;
    const images = index.images[latent];
    const mosaic = el("span", { class: `mosaic ${images.length ? `n${images.length}` : "empty"}` },
      images.length ? images.map((image) => picture(image, "")) : el("span", { class: "silent", "aria-hidden": "true" }, "silent"));
    const lines = [
      el("span", { class: "card-name" }, called(latent)),
      nameOf(latent) ? el("span", { class: "score" }, `score ${format.score(index.scores[latent][0])}`) : null,
      index.class && images.length ? el("span", { class: "card-class" },
        el("span", { class: "meter", style: { "--part": String(index.frequency[latent]) } }),
        el("span", {}, `on ${format.percent(index.frequency[latent])} of ${index.class_names[index.class[latent]]}`)) : null,
      el("span", { class: "card-foot" }, el("span", { class: "number" }, `#${latent}`), el("span", {}, `on ${format.percent(index.share[latent])} of images`)),
    ];
    return el("a", { class: "card", href: `#latent=${latent}`, "data-latent": latent }, mosaic, el("span", { class: "card-text" }, lines));
  }

  const cards = (latents) => el("ul", { class: "grid" }, latents.map((latent) => el("li", {}, card(latent))));

  atlas.cards = { about, called, card, cards, linked, nameOf, percent: format.percent, picture, title };
})();
