"use strict";
// The list of latents: search, sort, filter. What is asked for stands in the address, so that it can be linked to.
(() => {
  const { el, format } = atlas;
  const STEP = 48;
  const SORTS = {
    fit: { text: "fit to the search", key: (index, at) => fits.get(at) || 0 },
    index: { text: "number", key: (index, at) => at, up: true },
    share: { text: "share of images", key: (index, at) => index.share[at] },
    max: { text: "largest activation", key: (index, at) => index.max[at] },
    mean: { text: "mean activation", key: (index, at) => index.mean[at] },
    score: { text: "score of the name", key: (index, at) => index.scores[at][0], needs: "scores" },
    frequency: { text: "class frequency", key: (index, at) => index.frequency[at], needs: "frequency" },
  };
  const FILTERS = {
    all: { text: "all latents", test: () => true },
    active: { text: "active", test: (index, at) => index.count[at] > 0 },
    silent: { text: "silent", test: (index, at) => index.count[at] === 0 },
    rare: { text: "rare, up to 1 % of images", test: (index, at) => index.count[at] > 0 && index.share[at] <= 0.01 },
    common: { text: "common, over 10 % of images", test: (index, at) => index.share[at] > 0.1 },
    selective: { text: "active on half of a class", test: (index, at) => index.frequency[at] >= 0.5, needs: "frequency" },
  };

  let list = [];
  let shown = 0;
  let made = null;
  let key = null;
  let fits = new Map();

  /** The latents that a request (`q`, `sort`, `order`, `filter`, `class`) asks for, in order. */
  function select(request) {
    const index = atlas.data.latents;
    const usable = (group, name, otherwise) => (group[name] && (!group[name].needs || index[group[name].needs]) ? group[name] : otherwise);
    const asked = search(request.get("q") || "");
    fits = asked.found;
    const sort = usable(SORTS, request.get("sort"), asked.terms.length ? SORTS.fit : SORTS.index);
    const filter = usable(FILTERS, request.get("filter"), FILTERS.all);
    const wanted = request.get("class");
    const found = [];
    for (let at = 0; at < index.share.length; at++) {
      if (!filter.test(index, at)) continue;
      if (wanted && index.class && index.class_names[index.class[at]] !== wanted) continue;
      if (asked.terms.length && !asked.found.has(at)) continue;
      found.push(at);
    }
    const down = request.get("order") ? request.get("order") === "down" : !sort.up;
    const sign = down ? -1 : 1;
    found.sort((a, b) => sign * (sort.key(index, a) - sort.key(index, b)) || a - b);
    return found;
  }

  /** What a search finds: latents by number, or those that point to a word that it is, or is the beginning of.
      `found` maps latents to how well they fit, `words` are the words it was read as, `nearest` the best latent of
      those words if none scores above the floor. */
  function search(text) {
    const index = atlas.data.latents;
    const terms = text.toLowerCase().split(/\s+/).filter(Boolean);
    const found = new Map();
    const words = [];
    let nearest = null;
    if (terms.length && terms.every((term) => /^#?\d+$/.test(term))) {
      terms.forEach((term, at) => found.set(Number(term.replace("#", "")), terms.length - at));
      return { terms, found, words, nearest };
    }
    if (!terms.length) return { terms, found, words, nearest };
    index.words.forEach((word, number) => {
      const parts = word.toLowerCase().split(/[^\p{L}\p{N}]+/u);
      if (!terms.every((term) => parts.some((part) => part.startsWith(term)) || word.toLowerCase().startsWith(term))) return;
      words.push(word);
      const [latents, scores] = index.found[number];
      latents.forEach((latent, at) => {
        if (!index.count[latent]) return;
        if (scores[at] >= index.floor) found.set(latent, Math.max(scores[at], found.get(latent) || -1));
        if (!nearest || scores[at] > nearest.score) nearest = { latent, word, score: scores[at] };
      });
    });
    return { terms, found, words, nearest };
  }

  /** What stands in place of the list where a search finds nothing. */
  function nothing(request) {
    const index = atlas.data.latents;
    const asked = search(request.get("q") || "");
    if (!asked.terms.length || asked.found.size) return ["No latent fits. Clear the search, or choose “all latents”."];
    const named = index.class_names.find((name) => index.class && asked.terms.every((term) => name.toLowerCase().includes(term)));
    return [
      asked.nearest ? [`No latent points to “${asked.nearest.word}” more than chance would have it. The nearest is `,
        el("a", { href: `#latent=${asked.nearest.latent}` }, `latent ${asked.nearest.latent}`), `, with ${format.score(asked.nearest.score)}; a name takes ${format.score(index.floor)}. `]
        : "No word of the vocabulary begins so. ",
      named ? el("a", { href: `#view=latents&sort=frequency&class=${encodeURIComponent(named)}` }, `Latents that are most active on images of “${named}”`) : null,
    ];
  }

  function change(name, value) {
    const request = new URLSearchParams(location.hash.slice(1));
    if (name === "q" && !request.get("q")) for (const one of ["sort", "order"]) request.delete(one); // a search brings its own order
    request.set("view", "latents");
    for (const one of ["latent", "image"]) request.delete(one);
    if (value) request.set(name, value);
    else request.delete(name);
    if (name === "sort") request.delete("order");
    // From another page it is a step that "back" undoes; further letters and choices are not.
    if (document.getElementById("latents").hidden) history.pushState(null, "", `#${request}`);
    else history.replaceState(null, "", `#${request}`);
    atlas.route({ keepFocus: true });
  }

  function choice(id, label, options, value, onchange) {
    return el("div", { class: "field" }, el("label", { for: id }, label),
      el("select", { id, onchange: (event) => onchange(event.target.value) },
        options.map(([name, text]) => el("option", { value: name, selected: name === value }, text))));
  }

  function toolbar(request) {
    const index = atlas.data.latents;
    const searched = (request.get("q") || "").trim() !== "";
    const sort = request.get("sort") || (searched ? "fit" : "index");
    const usable = (group) => Object.entries(group).filter(([, one]) => !one.needs || index[one.needs]).map(([name, one]) => [name, one.text]);
    const down = request.get("order") ? request.get("order") === "down" : !(SORTS[sort] || SORTS.index).up;
    const parts = [
      choice("sort", "Sort by", usable(SORTS).filter(([name]) => searched || name !== "fit"), sort, (value) => change("sort", value)),
      choice("order", "Order", [["down", "largest first"], ["up", "smallest first"]], down ? "down" : "up", (value) => change("order", value)),
      choice("filter", "Show", usable(FILTERS), request.get("filter") || "all", (value) => change("filter", value === "all" ? "" : value)),
    ];
    if (index.class) {
      const names = [...index.class_names].sort((a, b) => a.localeCompare(b));
      parts.push(choice("class", "Strongest class", [["", "any"], ...names.map((name) => [name, name])], request.get("class") || "", (value) => change("class", value)));
    }
    return parts;
  }

  function more(container, button) {
    const next = list.slice(shown, shown + STEP);
    container.append(...next.map((latent) => el("li", {}, atlas.cards.card(latent))));
    shown += next.length;
    button.hidden = shown >= list.length;
    button.textContent = `Show more (${format.whole(list.length - shown)} left)`;
  }

  function start(view) {
    const grid = el("ul", { class: "grid", id: "grid" });
    const button = el("button", { type: "button", class: "more" });
    made = {
      tools: el("div", { class: "toolbar" }), count: el("p", { class: "count", role: "status", id: "count" }), grid, button,
      empty: el("p", { class: "nothing", hidden: true }, ""),
    };
    button.addEventListener("click", () => more(grid, button));
    // Further cards are made when the end of the list comes near.
    new IntersectionObserver((entries) => { if (entries.some((one) => one.isIntersecting) && !button.hidden) more(grid, button); }, { rootMargin: "600px" }).observe(button);
    view.append(el("h1", { tabindex: -1 }, "Latents"), made.tools, made.count, made.empty, grid, button);
  }

  /** Shows what the request asks for; the cards stay where they are when it is what was shown before. */
  function show(view, request) {
    if (!made) start(view);
    const asked = ["q", "sort", "order", "filter", "class"].map((name) => request.get(name) || "").join("\u0000");
    if (asked === key) return;
    key = asked;
    list = select(request);
    shown = 0;
    const focused = document.activeElement && made.tools.contains(document.activeElement) ? document.activeElement.id : null;
    made.tools.replaceChildren(...toolbar(request));
    if (focused) document.getElementById(focused).focus();
    made.grid.replaceChildren();
    made.empty.hidden = list.length > 0;
    if (!list.length) made.empty.replaceChildren(...nothing(request).flat().filter(Boolean));
    const { words } = search(request.get("q") || "");
    const read = words.length ? ` point to ${words.slice(0, 6).map((word) => `“${word}”`).join(", ")}${words.length > 6 ? ` or one of ${words.length - 6} more words` : ""}` : "";
    made.count.textContent = `${format.whole(list.length)} of ${format.whole(atlas.data.latents.share.length)} latents${read}`;
    more(made.grid, made.button);
  }

  /** The latent `by` places further in the list, or from the first one. */
  function neighbour(latent, by) {
    const all = list.length ? list : select(new URLSearchParams());
    const at = all.indexOf(latent);
    if (at < 0) return all[0];
    return all[Math.min(all.length - 1, Math.max(0, at + by))];
  }

  /** Moves the focus between cards: to the side, or to the card above or below. */
  function step(key) {
    const cards = [...document.querySelectorAll(".view:not([hidden]) .card")];
    const at = cards.indexOf(document.activeElement);
    if (!cards.length || (at < 0 && document.activeElement !== document.body && document.activeElement.tagName !== "H1")) return false;
    let to = at < 0 ? 0 : at;
    if (at >= 0 && key === "ArrowRight") to = at + 1;
    if (at >= 0 && key === "ArrowLeft") to = at - 1;
    if (at >= 0 && (key === "ArrowUp" || key === "ArrowDown")) {
      const here = cards[at].getBoundingClientRect();
      const rows = cards.map((card, place) => ({ place, box: card.getBoundingClientRect() }))
        .filter(({ box }) => (key === "ArrowDown" ? box.top > here.bottom - 4 : box.bottom < here.top + 4));
      rows.sort((a, b) => Math.abs(a.box.top - here.top) - Math.abs(b.box.top - here.top) || Math.abs(a.box.left - here.left) - Math.abs(b.box.left - here.left));
      if (rows.length) to = rows[0].place;
    }
    if (!cards[to]) return false;
    cards[to].focus();
    cards[to].scrollIntoView({ block: "nearest" });
    return true;
  }

  atlas.grid = { show, neighbour, step, select, change };
})();
