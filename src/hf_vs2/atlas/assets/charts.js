"use strict";
// Charts in SVG, drawn at the width that they have: text keeps its size on a phone.
(() => {
  const { el, svg, format } = atlas;

  /** A figure that is drawn again whenever its width changes; `draw(width)` gives an SVG element. */
  function figure(label, draw, caption) {
    const box = el("div", { class: "plot" });
    let last = 0;
    new ResizeObserver(() => {
      const width = Math.floor(box.clientWidth);
      if (width === last || width < 40) return;
      last = width;
      const drawn = draw(width);
      drawn.setAttribute("role", "img");
      drawn.setAttribute("aria-label", label);
      box.replaceChildren(drawn);
    }).observe(box);
    return el("figure", {}, box, caption && el("figcaption", {}, caption));
  }

  /** Round numbers from about `low` to `high`. */
  function ticks(low, high, about = 5) {
    const span = high - low || 1;
    const rough = span / about;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((one) => one * power).find((one) => one >= rough);
    const first = Math.ceil(low / step - 1e-9) * step;
    const found = [];
    for (let at = first; at <= high + step * 1e-6; at += step) found.push(Number(at.toPrecision(10)));
    return found;
  }

  function frame(width, height, pad, x, y, options = {}) {
    const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, class: "chart" });
    const right = width - pad.right;
    const bottom = height - pad.bottom;
    for (const at of options.yTicks || ticks(...y.domain, 4)) {
      const place = y(at);
      root.append(svg("line", { class: "rule", x1: pad.left, x2: right, y1: place, y2: place }));
      root.append(svg("text", { class: "tick", x: pad.left - 6, y: place + 4, "text-anchor": "end" }, (options.yText || format.number)(at)));
    }
    for (const at of options.xTicks || ticks(...x.domain, Math.max(2, width / 110))) {
      root.append(svg("text", { class: "tick", x: x(at), y: bottom + 16, "text-anchor": "middle" }, (options.xText || format.number)(at)));
    }
    root.append(svg("line", { class: "axis", x1: pad.left, x2: right, y1: bottom, y2: bottom }));
    if (options.xLabel) root.append(svg("text", { class: "label", x: (pad.left + right) / 2, y: height - 2, "text-anchor": "middle" }, options.xLabel));
    if (options.yLabel) root.append(svg("text", { class: "label", x: pad.left - 6, y: 11, "text-anchor": "start", dx: 6 - pad.left + 2 }, options.yLabel));
    return root;
  }

  function scale(domain, range) {
    const [low, high] = domain;
    const span = high - low || 1;
    const place = (value) => range[0] + ((value - low) / span) * (range[1] - range[0]);
    place.domain = domain;
    return place;
  }

  /** Lines over steps; each `{name, values, kind}`, kind 1 or 2 for its colour. */
  function lines(label, steps, curves, options = {}) {
    return figure(label, (width) => {
      const height = options.height || 190;
      const pad = { left: 44, right: 12, top: 22, bottom: 36 };
      const known = curves.flatMap((curve) => curve.values.filter((value) => value !== null));
      const top = Math.max(...known, 1e-9);
      const x = scale([Math.min(...steps), Math.max(...steps)], [pad.left, width - pad.right]);
      const y = scale([0, top * 1.05], [height - pad.bottom, pad.top]);
      const root = frame(width, height, pad, x, y, options);
      for (const curve of curves) {
        const points = steps.map((step, at) => [step, curve.values[at]]).filter(([, value]) => value !== null);
        const path = points.map(([step, value], at) => `${at ? "L" : "M"}${x(step).toFixed(1)},${y(value).toFixed(1)}`).join("");
        root.append(svg("path", { class: `line kind${curve.kind}`, d: path }));
        if (points.length < 30) {
          for (const [step, value] of points) {
            root.append(svg("circle", { class: `dot kind${curve.kind}`, cx: x(step), cy: y(value), r: 2.6 }, svg("title", {}, `${curve.name} at ${format.whole(step)}: ${format.number(value)}`)));
          }
        }
      }
      return root;
    }, options.caption);
  }

  /** Bars of equal width over [low, high]; `mark` is `{at, text}`, a vertical line. */
  function histogram(label, counts, low, high, options = {}) {
    return figure(label, (width) => {
      const height = options.height || 190;
      const pad = { left: 44, right: 12, top: 22, bottom: 36 };
      const total = options.total || counts.reduce((sum, one) => sum + one, 0) || 1;
      const shares = counts.map((one) => (100 * one) / total);
      const x = scale([low, high], [pad.left, width - pad.right]);
      const y = scale([0, Math.max(...shares, 1e-9) * 1.06], [height - pad.bottom, pad.top]);
      const root = frame(width, height, pad, x, y, options);
      const step = (high - low) / counts.length;
      counts.forEach((count, at) => {
        if (!count) return;
        const left = x(low + at * step);
        const beyond = options.mark && low + (at + 0.5) * step > options.mark.at;
        root.append(svg("rect", {
          class: `bar${beyond ? " kind2" : ""}`, x: left + 0.5, width: Math.max(1, x(low + (at + 1) * step) - left - 1),
          y: y(shares[at]), height: height - pad.bottom - y(shares[at]), rx: 1.5,
        }, svg("title", {}, `${format.number(low + at * step)} to ${format.number(low + (at + 1) * step)}: ${format.whole(count)}`)));
      });
      if (options.mark) {
        const at = x(options.mark.at);
        root.append(svg("line", { class: "mark", x1: at, x2: at, y1: pad.top - 4, y2: height - pad.bottom }));
        const before = at > width * 0.6;
        root.append(svg("text", { class: "note", x: at + (before ? -6 : 6), y: pad.top + 6, "text-anchor": before ? "end" : "start" }, options.mark.text));
      }
      return root;
    }, options.caption);
  }

  /** Accuracy over gamma and lambda, coloured by the difference to plain CLIP, with a scale; lambda runs down the side
      where the window is narrow, so that every cell can hold its number. */
  function heatMap(grid) {
    const label = `Top-1 accuracy for ${grid.gammas.length} values of gamma and ${grid.lambdas.length} of lambda; plain CLIP has ${format.digits(grid.plain, 2)} percent.`;
    const gains = grid.top1.flat().map((value) => value - grid.plain);
    const most = Math.max(...gains.map(Math.abs), 0.01);
    return figure(label, (width) => {
      const upright = width < 480;
      const [across, down] = upright ? [grid.gammas, grid.lambdas] : [grid.lambdas, grid.gammas];
      const pad = { left: 52, right: 4, top: 22, bottom: 84 };
      const cell = (width - pad.left - pad.right) / across.length;
      const tall = Math.min(34, Math.max(26, cell * 0.8));
      const height = pad.top + pad.bottom + tall * down.length;
      const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, class: `chart${cell < 38 ? " tight" : ""}` });
      const box = (x, y, wide, high, gain, own) => svg("rect", { class: `heat ${gain < 0 ? "loss" : "gain"}${own ? " own" : ""}`, x, y, width: wide, height: high, rx: 3, style: { "--strength": String(Math.abs(gain) / most) } });
      down.forEach((value, row) => {
        const y = pad.top + (down.length - 1 - row) * tall;
        root.append(svg("text", { class: "tick", x: pad.left - 8, y: y + tall / 2 + 4, "text-anchor": "end" }, format.number(value)));
        across.forEach((other, column) => {
          const [gamma, lambda] = upright ? [other, value] : [value, other];
          const top1 = grid.top1[upright ? column : row][upright ? row : column];
          const gain = top1 - grid.plain;
          const x = pad.left + column * cell;
          root.append(svg("g", {}, svg("title", {}, `gamma ${gamma}, lambda ${lambda}: ${format.digits(top1, 2)} %, ${format.points(gain)} points`),
            box(x + 1, y + 1, cell - 2, tall - 2, gain, gamma === grid.gamma && lambda === grid.lambda),
            svg("text", { class: "heat-text", x: x + cell / 2, y: y + tall / 2 + 4, "text-anchor": "middle" }, format.digits(top1, 1))));
        });
      });
      across.forEach((value, column) => root.append(svg("text", { class: "tick", x: pad.left + (column + 0.5) * cell, y: height - pad.bottom + 16, "text-anchor": "middle" }, format.number(value))));
      const names = upright ? ["gamma", "lambda"] : ["lambda", "gamma"];
      root.append(svg("text", { class: "label", x: pad.left + (width - pad.left) / 2, y: height - pad.bottom + 33, "text-anchor": "middle" }, names[0]));
      root.append(svg("text", { class: "label", x: 2, y: 11 }, names[1]));
      const long = Math.min(260, width - 40);
      const start = (width - long) / 2;
      const steps = 20;
      for (let at = 0; at < steps; at++) root.append(box(start + (at * long) / steps, height - 36, long / steps + 0.4, 12, ((2 * at + 1 - steps) / steps) * most, false));
      [-most, 0, most].forEach((gain, at) => root.append(svg("text", { class: "tick", x: start + (at * long) / 2, y: height - 10, "text-anchor": "middle" }, gain ? `${format.points(gain)}${at ? " points" : ""}` : "plain CLIP")));
      return root;
    });
  }

  /** Each latent a dot: how often it is active, and `heights`, a number from 0 to 1. */
  function map(label, heights, yLabel, shares, about, open) {
    const tip = document.getElementById("tip");
    return figure(label, (width) => {
      const height = Math.min(420, Math.max(260, width * 0.42));
      const pad = { left: 46, right: 14, top: 24, bottom: 40 };
      const active = shares.map((share, at) => at).filter((at) => shares[at] > 0 && heights[at] !== null);
      const logs = active.map((at) => Math.log10(shares[at]));
      const least = logs.reduce((low, one) => Math.min(low, one), 0);
      const most = logs.reduce((high, one) => Math.max(high, one), least + 0.3);
      const x = scale([least - 0.05, most + 0.08], [pad.left, width - pad.right]);
      const top = active.reduce((high, at) => Math.max(high, heights[at]), 0.01);
      const floor = active.reduce((low, at) => Math.min(low, heights[at]), 0);
      const y = scale([floor, top * 1.04], [height - pad.bottom, pad.top]);
      const decades = [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1].filter((one) => Math.log10(one) >= least - 0.05 && Math.log10(one) <= most + 0.08);
      const root = frame(width, height, pad, x, y, { xTicks: decades.map(Math.log10), xText: (at) => format.percent(10 ** at), xLabel: "share of images (log)", yLabel });
      const dots = svg("g", { class: "dots" });
      const size = active.length > 1500 ? 2.4 : active.length > 500 ? 3.2 : 4;
      for (const at of active) dots.append(svg("circle", { cx: x(Math.log10(shares[at])).toFixed(1), cy: y(heights[at]).toFixed(1), r: size, "data-latent": at }));
      root.append(dots);
      const show = (event) => {
        const at = event.target.dataset && event.target.dataset.latent;
        tip.hidden = at === undefined;
        if (at === undefined) return;
        tip.textContent = about(Number(at));
        const box = tip.getBoundingClientRect();
        tip.style.setProperty("left", `${Math.max(8, Math.min(event.clientX + 12, innerWidth - box.width - 8))}px`);
        tip.style.setProperty("top", `${event.clientY + 16}px`);
      };
      dots.addEventListener("pointermove", show);
      dots.addEventListener("pointerleave", () => { tip.hidden = true; });
      dots.addEventListener("click", (event) => {
        tip.hidden = true;
        if (event.target.dataset.latent !== undefined) open(Number(event.target.dataset.latent));
      });
      return root;
    });
  }

  atlas.charts = { lines, histogram, heatMap, map };
})();
