"use strict";
// The first page: where the autoencoder comes from, how good it is, what steering with it does.
(() => {
  const { el, format } = atlas;
  const MANY_CLASSES = 24;

  const tile = (value, text, note) => el("div", { class: "tile" }, el("dt", {}, text, note ? el("small", {}, note) : null), el("dd", {}, value));
  const missing = (why) => el("p", { class: "missing" }, why);
  const panel = (title, hint, wide, ...children) => el("section", { class: `panel${wide ? " wide" : ""}` }, el("h2", {}, title), hint ? el("p", { class: "hint" }, hint) : null, children);

  function head(page) {
    const facts = page.facts;
    const source = [facts.base_model, facts.checkpoint].filter(Boolean).join(" · ");
    const active = `${facts.top_k} active on an image`;
    return el("header", { class: "hero" },
      el("p", { class: "eyebrow" }, "Feature atlas"),
      el("h1", { tabindex: -1 }, facts.dataset || "Latents of a sparse autoencoder"),
      el("p", { class: "lead" }, `${format.whole(page.num_latents)} latents of a sparse autoencoder on CLIP’s CLS activations, ${active}, seen through ${format.whole(page.num_images)} images.`),
      source ? el("p", { class: "source" }, source) : null);
  }

  function tiles(page) {
    const accuracy = page.accuracy;
    const held = page.training.metrics || {};
    return el("dl", { class: "tiles" },
      tile(format.whole(page.num_latents), "latents", `${format.whole(page.num_latents - page.silent)} active here`),
      tile(format.percent(page.silent / page.num_latents), "silent on these images", held.dead_share === undefined ? null : `dead after training: ${format.percent(held.dead_share)}`),
      page.fvu.mean === null ? null : tile(format.number(page.fvu.mean), "mean FVU of an image", page.fvu.steered === null ? "no gate" : `gate lets ${format.percent(page.fvu.steered)} pass`),
      accuracy ? tile(`${format.digits(accuracy.plain, 1)} %`, "plain CLIP, top\u20111") : null,
      accuracy ? tile(`${format.digits(accuracy.steered, 1)} %`, "steered, top\u20111", `${format.points(accuracy.steered - accuracy.plain)} points`) : null);
  }

  /** The clearest latents of different classes, or else those with the best names. */
  function featured(index) {
    const key = (at) => (index.frequency ? index.frequency[at] : 1) * (atlas.cards.nameOf(at) ? index.scores[at][0] : 0);
    const ranked = index.share.map((_, at) => at).filter((at) => index.count[at] >= 4).sort((a, b) => key(b) - key(a) || a - b);
    const group = (at) => (index.class ? index.class[at] : index.names[at][0]);
    const seen = new Set();
    const first = ranked.filter((at) => !seen.has(group(at)) && seen.add(group(at)));
    const others = ranked.filter((at) => !first.includes(at)).slice(0, 12);
    return [...first, ...others].slice(0, 12);
  }

  function training(page) {
    const log = page.training;
    if (log.missing) return panel("Training", null, false, missing(log.missing));
    const last = (values) => values.filter((value) => value !== null).at(-1);
    const dead = log.dead_share.some((value) => value !== null);
    const held = log.metrics.fvu === undefined ? "" : ` ${format.number(log.metrics.fvu)} on rows held out.`;
    return panel("Training", null, false,
      el("p", { class: "legend" }, el("span", { class: "key kind1" }, "FVU"), dead ? el("span", { class: "key kind2" }, "share of dead latents") : null),
      atlas.charts.lines(`Training curves over ${format.whole(log.steps.at(-1))} steps: FVU ends at ${format.number(last(log.fvu))}.`, log.steps,
        [{ name: "FVU", values: log.fvu, kind: 1 }, ...(dead ? [{ name: "dead share", values: log.dead_share, kind: 2 }] : [])], { height: 220, xLabel: "step" }),
      el("p", { class: "hint" }, `FVU ${format.number(last(log.fvu))} on the last batches logged.${held}`));
  }

  function fvu(page) {
    const part = page.fvu;
    const mark = part.threshold === null ? null : { at: part.threshold, text: `gate, τ = ${format.number(part.threshold)}` };
    const said = part.threshold === null ? "The model has no gate: every image is steered." : `${format.percent(part.steered)} of the images lie below the gate’s threshold and are steered.`;
    return panel("Reconstruction of single images", null, false,
      atlas.charts.histogram(`Histogram of per-sample FVU. ${said}`, part.counts, 0, part.limit, { height: 244, mark, xLabel: "per-sample FVU (last bar: all beyond)", yLabel: "% of images" }),
      el("p", { class: "hint" }, said));
  }

  /** A gain as a dot and its interval as a line, on the axis from `low` to `high` that all rows share; grey where the
      interval holds 0, or is not known. */
  function interval(row, low, high) {
    const at = (value) => String((value - low) / (high - low || 1));
    const [from, to] = row.gain_ci || [row.gain, row.gain];
    const kind = !row.gain_ci || (from <= 0 && to >= 0) ? "open" : row.gain < 0 ? "loss" : "gain";
    return el("span", { class: `interval-plot ${kind}`, style: { "--zero": at(0), "--from": at(from), "--to": at(to), "--at": at(row.gain) } },
      el("span", { class: "range" }), el("span", { class: "point" }));
  }

  function results(page) {
    const part = page.results;
    if (part.missing) return panel("Methods compared", null, true, missing(part.missing));
    const rows = part.rows;
    const ends = rows.filter((row) => !row.plain).flatMap((row) => [row.gain, ...(row.gain_ci || [])]).filter((value) => value !== null && value !== undefined);
    const low = Math.min(0, ...ends);
    const high = Math.max(0.01, ...ends);
    const body = rows.map((row) => {
      const ci = row.gain_ci && !row.plain ? `[${format.points(row.gain_ci[0])}, ${format.points(row.gain_ci[1])}]` : "";
      const settled = row.gain_ci && !(row.gain_ci[0] <= 0 && row.gain_ci[1] >= 0);
      const gain = row.plain ? "–" : el("span", { class: !settled ? "soft-text" : row.gain < 0 ? "bad-text" : "good-text" }, format.points(row.gain));
      return el("tr", { class: row.plain ? "plain" : "" }, el("th", { scope: "row" }, row.method, el("small", {}, row.prompts)),
        el("td", { class: "num", "data-head": "top-1 in %" }, format.digits(row.top1, 2)),
        el("td", { class: "num", "data-head": "gain" }, gain), el("td", { class: "ci", "data-head": "95 % interval" }, ci),
        el("td", { class: "spark" }, row.plain ? null : interval(row, low, high)),
        el("td", { class: "num", "data-head": "steered" }, row.coverage === null || row.coverage === undefined ? "–" : format.percent(row.coverage)));
    });
    const heads = [["method and prompts", ""], ["top-1 in %", "num"], ["gain", "num"], ["95 % interval", ""],
      [el("span", { class: "axis-ends", style: { "--zero": String(-low / (high - low)) } }, el("span", {}, low < 0 ? format.points(low) : ""), el("span", { class: "at-zero" }, "0"), el("span", {}, format.points(high))), "spark"], ["steered", "num"]];
    return panel("Methods compared", `${format.whole(rows[0].n)} images${part.dataset ? ` of ${part.dataset}` : ""}. Gain over plain CLIP with the same prompts in points, as a dot with its 95 % interval; grey where the interval holds 0, so that neither gain nor loss is shown.`, true,
      el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Methods compared" }, el("table", { class: "results" },
        el("thead", {}, el("tr", {}, heads.map(([text, kind]) => el("th", { scope: "col", class: kind }, text)))), el("tbody", {}, body))));
  }

  function grid(page) {
    if (!page.grid) return null;
    const own = page.grid.gamma === null ? "" : ` Framed: this checkpoint’s own, gamma ${format.number(page.grid.gamma)} and lambda ${format.number(page.grid.lambda)}.`;
    return panel("Gamma and lambda", `Top-1 accuracy in % of the images here, without the gate; plain CLIP has ${format.digits(page.grid.plain, 2)}.${own} The best cell was found with the labels of these images, so it promises nothing for others.`, true, atlas.charts.heatMap(page.grid));
  }

  function classes(page) {
    if (!page.classes) return null;
    const names = atlas.data.latents.class_names;
    const ranked = page.classes.map((one) => ({ ...one, gain: one.steered - one.plain })).sort((a, b) => b.gain - a.gain || a.index - b.index);
    const most = Math.max(...ranked.map((one) => Math.abs(one.gain)), 0.01);
    const won = ranked.filter((one) => one.gain > 0).length;
    const lost = ranked.filter((one) => one.gain < 0).length;
    const line = (one) => el("li", { class: "class-line" }, el("span", { class: "bar-text" }, names[one.index]),
      atlas.latent.twoWay(one.gain, most),
      el("span", { class: "bar-value" }, el("b", { class: one.gain < 0 ? "bad-text" : one.gain > 0 ? "good-text" : "" }, format.points(one.gain)), el("small", {}, `${format.digits(one.plain, 0)} → ${format.digits(one.steered, 0)} %`)));
    const listOf = (some) => el("ol", { class: "class-list" }, some.map(line));
    const many = ranked.length > MANY_CLASSES;
    const edge = many ? [...ranked.slice(0, 10), ...ranked.slice(-10)] : ranked;
    const box = el("div", {}, listOf(edge));
    const button = many ? el("button", { type: "button", class: "quiet", "aria-expanded": "false" }, `Show all ${ranked.length} classes`) : null;
    if (button) {
      button.addEventListener("click", () => {
        const open = button.getAttribute("aria-expanded") === "false";
        button.setAttribute("aria-expanded", String(open));
        button.textContent = open ? "Show the edges only" : `Show all ${ranked.length} classes`;
        box.replaceChildren(listOf(open ? ranked : edge));
      });
    }
    return panel("Gain by class", `${won} of ${ranked.length} classes gain, ${lost} lose.${many ? " The ten largest gains and losses, which noise alone would spread too." : ""}`, true, box, button);
  }

  function example(one, fixed) {
    const names = atlas.data.latents.class_names;
    const most = Math.max(...one.movers.map(([, , push]) => Math.abs(push)), 1e-9);
    return el("li", { class: "example" },
      el("div", { class: "example-head" }, atlas.cards.linked(one.image, `image ${one.image}, ${names[one.label]}`),
        el("div", {}, el("p", { class: "true-class" }, names[one.label]),
          el("p", { class: "change" }, el(fixed ? "s" : "span", {}, names[one.old]), el("span", { "aria-hidden": "true" }, " → "), el("span", { class: "hidden-label" }, " became "), el("b", { class: fixed ? "good-text" : "bad-text" }, names[one.new])))),
      el("ol", { class: "movers" }, one.movers.map(([latent, value, push]) => el("li", {},
        el("a", { href: `#latent=${latent}`, title: `Latent ${latent}, value ${format.number(value)}` }, el("span", { class: "mover-name" }, atlas.cards.nameOf(latent) || `latent ${latent}`), el("span", { class: "number" }, `#${latent}`)),
        el("span", { class: `push ${push < 0 ? "loss" : "gain"}`, style: { "--part": String(Math.abs(push) / most) } }),
        el("span", { class: "bar-value" }, `${push > 0 ? "+" : "\u2212"}${Math.abs(push).toPrecision(2)}`)))));
  }

  function examples(page, fixed) {
    if (!page.accuracy) return null;
    const found = fixed ? page.fixed : page.broken;
    const count = fixed ? page.accuracy.fixed : page.accuracy.broken;
    const hint = `${format.whole(count)} images; the clearest, two of a class at most. Each latent’s share in the change: what it adds to the logit of the new class over the old one’s.`;
    return panel(fixed ? "Fixed by steering" : "Broken by steering", count ? hint : null, true,
      found.length ? el("ul", { class: "examples" }, found.map((one) => example(one, fixed))) : missing("None of the images."));
  }

  function map(index) {
    if (!index.frequency && !index.words.length) return null; // nothing to be higher by
    const heights = index.frequency || index.scores.map((line) => line[0]);
    const what = index.frequency ? "highest class frequency" : "score of the nearest word";
    return panel("Map of the latents", `Each dot is a latent. Further right: active on more images; higher: ${index.frequency ? "active on more of the class that it is most active on" : "nearer to its word"}.`, true,
      atlas.charts.map(`Scatter plot of ${heights.length} latents: share of images against ${what}. The list of latents holds the same.`, heights, what, index.share, atlas.cards.about, (latent) => { location.hash = `latent=${latent}`; }));
  }

  function own(page) {
    const labels = (atlas.data.latents.class_names.length ? atlas.data.latents.class_names : ["dog", "cat"]).slice(0, 3).map((name) => `"${name.replace(/["\\$`]/g, "")}"`).join(" ");
    return panel("An image of your own", "A page opened from disk has no CLIP to run. Where the checkpoint is, from the folder of this atlas:", true,
      el("pre", { tabindex: 0 }, `hf-vs2 explain photo.jpg --checkpoint ${page.facts.checkpoint || "CHECKPOINT"} --labels ${labels} --names latents.json`),
      el("p", { class: "hint after" }, "It prints which latents are active on the photograph and what they do to the scores, named as here. Type their numbers into the search, such as 17 204 31, to see them side by side."));
  }

  function show(view) {
    if (view.childElementCount) return;
    const page = atlas.data.overview;
    const index = atlas.data.latents;
    const absent = page.labels_missing ? panel("Gains, heat map, examples", null, true, missing(`${page.labels_missing} Without labels there is no accuracy to show.`)) : null;
    view.append(head(page), tiles(page),
      el("section", { class: "featured" }, el("div", { class: "row" }, el("h2", {}, "Some of the clearest latents"), el("a", { class: "quiet", href: "#view=latents" }, "All latents →")), atlas.cards.cards(featured(index))),
      el("div", { class: "panels" }, ...[map(index), training(page), fvu(page), results(page), grid(page), classes(page), examples(page, true), examples(page, false), absent, own(page)].filter(Boolean)),
      el("footer", { class: "foot" }, `Made with ${page.facts.made_with} on ${page.facts.date}. Names from ${page.facts.vocabulary}. The same for programs: `, el("a", { href: "latents.json" }, "latents.json"), "."));
  }

  atlas.overview = { show };
})();
