"use strict";
// Which page is shown follows from the address (#latent=17, #view=latents&q=fish), and the keys.
(() => {
  const views = ["overview", "latents", "latent", "image"];
  const places = {};
  let current = null;
  let turn = 0;

  function wanted() {
    const request = new URLSearchParams(location.hash.slice(1));
    const number = (name) => (/^\d+$/.test(request.get(name)) ? Number(request.get(name)) : -1);
    for (const view of ["latent", "image"]) if (request.has(view)) return { view, number: number(view), request };
    return { view: request.get("view") === "latents" ? "latents" : "overview", request };
  }

  async function route(options = {}) {
    const asked = wanted();
    const mine = ++turn;
    const status = document.getElementById("status");
    if (current) places[current] = scrollY;
    try {
      await Promise.all([atlas.load("overview"), atlas.load("latents")]);
      const view = document.getElementById(asked.view);
      const single = asked.number !== undefined;
      if (single) await atlas[asked.view].show(view, asked.number);
      if (mine !== turn) return; // another page was asked for meanwhile
      if (!single) {
        view.hidden = false; // charts are drawn at the width they have
        if (asked.view === "latents") atlas.grid.show(view, asked.request);
        else atlas.overview.show(view);
      }
    } catch (error) {
      status.hidden = false;
      status.classList.add("failed");
      status.textContent = error.message;
      throw error;
    }
    status.hidden = true;
    for (const name of views) document.getElementById(name).hidden = name !== asked.view;
    for (const name of ["overview", "latents"]) {
      const tab = document.getElementById(`tab-${name}`);
      if (name === asked.view || (name === "latents" && asked.number !== undefined)) tab.setAttribute("aria-current", "page");
      else tab.removeAttribute("aria-current");
    }
    const search = document.getElementById("search");
    if (asked.view === "latents" && document.activeElement !== search) search.value = asked.request.get("q") || "";
    if (asked.view === "latents") back = location.hash;
    const heading = document.querySelector(`#${asked.view} h1`);
    const source = atlas.data.overview.facts.dataset;
    document.title = [asked.number !== undefined ? `${asked.number} ${heading.textContent}` : heading.textContent, source !== heading.textContent && source, "Feature atlas"].filter(Boolean).join(" · ");
    for (const link of document.querySelectorAll("#back")) link.setAttribute("href", back);
    if (current !== asked.view || asked.number !== undefined) {
      scrollTo(0, asked.number !== undefined ? 0 : places[asked.view] || 0);
      if (current && !options.keepFocus) focusOn(asked, heading);
    }
    current = asked.view;
    last = asked.view === "latent" ? asked.number : last;
  }

  let back = "#view=latents";
  let last = null;

  /** Coming back to the list: the card that was opened; else the heading of the page. */
  function focusOn(asked, heading) {
    const card = asked.view === "latents" && last !== null ? document.querySelector(`#latents .card[data-latent="${last}"]`) : null;
    (card || heading).focus({ preventScroll: true });
  }

  function typed(event) {
    const dialog = document.getElementById("help");
    if (event.ctrlKey || event.metaKey || event.altKey || dialog.open) return;
    const search = document.getElementById("search");
    const field = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (event.key === "Escape") {
      if (event.target === search) search.blur();
      else if (current === "latent" || current === "image") location.hash = back;
      return;
    }
    if (field) return;
    const actions = {
      "/": () => { search.focus(); search.select(); },
      "?": () => dialog.showModal(),
      t: () => atlas.toggleTheme(),
      o: () => { location.hash = "view=overview"; },
      l: () => { location.hash = back; },
      j: () => { location.hash = `latent=${atlas.grid.neighbour(current === "latent" ? last : -1, 1)}`; },
      k: () => { location.hash = `latent=${atlas.grid.neighbour(current === "latent" ? last : -1, -1)}`; },
    };
    const arrow = event.key.startsWith("Arrow");
    if (arrow ? atlas.grid.step(event.key) : actions[event.key] && (actions[event.key](), true)) event.preventDefault();
  }

  atlas.route = route;
  atlas.startTheme();
  addEventListener("hashchange", () => route());
  addEventListener("keydown", typed);
  document.getElementById("help-button").addEventListener("click", () => document.getElementById("help").showModal());
  const search = document.getElementById("search");
  search.addEventListener("input", () => atlas.grid.change("q", search.value.trim()));
  search.form.addEventListener("submit", (event) => {
    event.preventDefault();
    const first = document.querySelector("#latents .card");
    if (first) first.focus();
  });
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault(); // the address names what is shown, not a place on the page
    document.querySelector(".view:not([hidden]) h1").focus();
  });
  route();
})();
