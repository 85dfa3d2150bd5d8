"use strict";
// What every other script uses: data that registers itself, elements, numbers as text, light and dark.
// Text from data sets goes into the page as text nodes and attributes alone; nothing here parses HTML.
const atlas = (() => {
  const data = {};
  const pending = {};

  /** Called by the scripts in data/. */
  function register(name, value) {
    data[name] = value;
  }

  /** The data of data/<name>.js, which is run when first asked for. */
  function load(name) {
    if (name in data) return Promise.resolve(data[name]);
    if (!(name in pending)) {
      pending[name] = new Promise((resolve, reject) => {
        const script = document.createElement("script");
        script.src = `data/${name}.js`;
        script.onload = () => (name in data ? resolve(data[name]) : script.onerror());
        script.onerror = () => {
          delete pending[name];
          reject(new Error(`data/${name}.js cannot be read: keep all files of the atlas together.`));
        };
        document.head.append(script);
      });
    }
    return pending[name];
  }

  const SVG = "http://www.w3.org/2000/svg";

  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name === "class") node.setAttribute("class", value);
      else if (name === "style") for (const [key, one] of Object.entries(value)) node.style.setProperty(key, one);
      else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else node.setAttribute(name, value === true ? "" : value);
    }
    for (const child of children.flat(Infinity)) {
      if (child !== null && child !== undefined && child !== false) node.append(child);
    }
    return node;
  }

  /** An HTML element; children are nodes or text. */
  const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  /** The same in SVG. */
  const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

  /** A percentage with so many decimals, and more where it would read 0 or 100 and is not. */
  function digits(value, decimals) {
    if (value === 0 || value === 100) return String(value);
    for (let more = decimals; more < 4; more++) {
      const rounded = Number(value.toFixed(more));
      if (rounded !== 0 && rounded !== 100) return value.toFixed(more);
    }
    return value < 50 ? "< 0.001" : "> 99.999";
  }

  const format = {
    whole: (value) => value.toLocaleString("en"),
    digits,
    percent: (share) => `${digits(100 * share, 100 * share < 10 ? 1 : 0)} %`,
    points: (value) => `${value > 0 ? "+" : value < 0 ? "\u2212" : "\u00b1"}${Math.abs(value).toFixed(2)}`,
    number: (value, digits = 3) => (value === null || value === undefined ? "–" : String(Number(value.toPrecision(digits))).replace("-", "\u2212")),
    score: (value) => (value === null ? "–" : value.toFixed(2).replace("-", "\u2212")),
  };

  function theme() {
    return document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  }

  // Some browsers keep nothing for pages from disk, and say so with an exception: the choice then lasts until the page is closed.
  function remembered(write) {
    try {
      if (write !== undefined) localStorage.setItem("hf_vs2-atlas-theme", write);
      return localStorage.getItem("hf_vs2-atlas-theme");
    } catch (error) {
      return null;
    }
  }

  function showTheme() {
    const button = document.getElementById("theme");
    button.setAttribute("aria-pressed", String(theme() === "dark"));
  }

  function setTheme(chosen, keep = true) {
    document.documentElement.dataset.theme = chosen;
    if (keep) remembered(chosen);
    showTheme();
  }

  function startTheme() {
    const before = remembered();
    if (before === "light" || before === "dark") setTheme(before, false);
    showTheme();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
    document.getElementById("theme").addEventListener("click", () => toggleTheme());
  }

  const toggleTheme = () => setTheme(theme() === "dark" ? "light" : "dark");

  return { register, load, el, svg, format, data, startTheme, toggleTheme, theme };
})();
