"use strict";

const maker = (space) => (name, attributes, ...children) => {
  const element = document.createElementNS(space, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
};
const svg = maker("http://www.w3.org/2000/svg");
const html = maker(document.documentElement.namespaceURI);

/* One frame of a sprite (frames side by side), with the outlines of its nuclei above it. */
function tile(data, sprite, k, num, label, outline) {
  const [width, height] = [num * data.size, data.size];
  const parts = [svg("image", { href: sprite, x: -k * data.size, y: 0, width, height, preserveAspectRatio: "none" })];
  if (outline) {
    const paths = ["halo", "ring"].map((kind) => svg("path", { class: kind, d: outline }));
    parts.push(svg("g", { class: "nuclei", transform: "scale(.1)" }, ...paths));
  }
  const viewBox = `0 0 ${data.size} ${data.size}`;
  const kind = data.pixelated ? "pixelated" : "";
  return svg("svg", { viewBox, role: "img", "aria-label": label, "data-frame": k, class: kind }, ...parts);
}

function nearest(levels, level) {
  let best = 0;
  levels.forEach((one, k) => { if (Math.abs(one - level) < Math.abs(levels[best] - level) - 1e-9) best = k; });
  return best;
}

/* Where a drawn line (pixels) stands at x; null outside it. */
function onCurve(line, x) {
  const points = [...line.points];
  const i = points.findIndex((point, k) => k > 0 && x <= point.x + 1e-3 && x >= points[k - 1].x - 1e-3);
  if (i < 0) return null;
  const [a, b] = [points[i - 1], points[i]];
  return b.x > a.x ? a.y + (b.y - a.y) * (x - a.x) / (b.x - a.x) : b.y;
}

function chartScale(chart) {
  const of = (name) => Number(chart.dataset[name]);
  return {
    x: (level) => of("x0") + (of("x1") - of("x0")) * level,
    y: (value) => of("y0") + (of("y1") - of("y0")) * (value - of("v0")) / (of("v1") - of("v0")),
  };
}

/* The key of a single sequence's curve: what follows the chapter and the chart's use. */
const curveKey = (chart) => chart.dataset.key.split("/").slice(2).join("/");

function viewer(root) {
  const data = JSON.parse(root.querySelector(".data").textContent);
  const find = (selector) => root.querySelector(selector);
  const [slider, select, boxes] = [find(".level"), find(".source"), find(".outlines")];
  const radios = [...root.querySelectorAll(".methods input")];
  const own = [...root.querySelectorAll(".chart:not(.still)")];
  const charts = [...own, ...[...root.closest(".chapter").querySelectorAll(".chart:not(.still)")].filter((one) => !own.includes(one))];
  const state = { level: 0, source: 0, slot: data.methods[0].slot };

  const source = () => data.sources[state.source];
  const shown = (one) => source().shown[one.slot];
  const shownMethods = () => data.methods.filter(shown);
  const method = () => shownMethods().find((one) => one.slot === state.slot) || shownMethods()[0];
  const base = () => method().levels;
  const level = () => base()[state.level];

  function realAt(at) {
    const levels = data.methods[0].levels;  // by whose numbers real patches are kept
    const k = nearest(levels, at);
    return Math.abs(levels[k] - at) < 0.03 ? data.real[k] : undefined;
  }

  function picture(one, k) {
    const { sprite, outlines } = shown(one);
    const label = `${one.name}, level ${one.levels[k]}, source ${source().label}`;
    return tile(data, sprite, k, one.levels.length, label, outlines && outlines[k]);
  }

  function drawLadder() {
    const row = (name, chosen, make) => html("tr", { class: chosen ? "chosen" : "" }, html("th", { scope: "row" }, name),
      ...base().map((at, k) => {
        const button = html("button", { type: "button", tabindex: -1 }, make(at) || "");
        button.addEventListener("click", () => set({ level: k }));
        return html("td", {}, button);
      }));
    const rows = shownMethods().map((one) => row(one.name, one === method(), (at) => picture(one, nearest(one.levels, at))));
    if (Object.keys(data.real).length) {
      rows.push(row("real, same level", false, (at) => {
        const real = realAt(at);
        return real && tile(data, real.sprite, 0, real.num, `a real patch of level ${at}`, null);
      }));
    }
    const head = html("tr", {}, html("th", {}), ...base().map((at) => html("th", { scope: "col" }, at.toFixed(2))));
    find(".ladder").replaceChildren(html("table", {}, html("thead", {}, head), html("tbody", {}, ...rows)));
  }

  function drawCurves() {
    for (const chart of own) {
      const { x, y } = chartScale(chart);
      const lines = shownMethods().flatMap((one) => {
        const values = shown(one).curves[curveKey(chart)];
        if (!values) return [];
        const places = values.map((v, k) => v !== null && `${x(one.levels[k]).toFixed(1)},${y(v).toFixed(1)}`);
        const kind = `line ${one.style}${one === method() ? "" : " other"}`;
        return [svg("polyline", { class: kind, points: places.filter(Boolean).join(" ") })];
      });
      // Of the means only the chosen method's: those of all together would hide the sequence.
      chart.querySelectorAll("[data-series]").forEach((mean) => mean.classList.toggle("away", mean.dataset.series !== method().name));
      lines.sort((a, b) => b.classList.contains("other") - a.classList.contains("other"));
      chart.querySelector(".own").replaceChildren(...lines);
    }
  }

  function moveMarkers() {
    for (const chart of charts) {
      const { x, y } = chartScale(chart);
      const [at, marks, drawn] = [x(level()), [], new Set()];
      const add = (style, left, top, isOther, size) => {
        const path = svg("path", { class: "mark", d: data.marks[Number(style.slice(1))] });
        const transform = `translate(${left} ${top}) scale(${size})`;
        marks.unshift(svg("g", { class: style + (isOther ? " other" : ""), transform }, path));  // the first lies on top
      };
      for (const end of ["x1", "x2"]) chart.querySelector(".cursor").setAttribute(end, at);
      for (const one of own.includes(chart) ? shownMethods() : []) {
        const [values, k] = [shown(one).curves[curveKey(chart)], nearest(one.levels, level())];
        if (!values || values[k] === null) continue;
        add(one.style, x(one.levels[k]), y(values[k]), one !== method(), one === method() ? 1.7 : 1.1);
        drawn.add(one.name);
      }
      for (const series of chart.querySelectorAll(".series:not(.away)")) {
        const { style, series: name } = series.dataset;
        if (!style.startsWith("m") || drawn.has(name)) continue;
        const top = onCurve(series.querySelector("polyline"), at);
        if (top !== null) add(style, at, top, false, 1.5);
      }
      chart.querySelector(".now").replaceChildren(...marks);
    }
  }

  function readout() {
    const [at, share] = [`level ${level().toFixed(2)}`, (value) => `${Math.round(100 * value)} %`];
    const parts = [`requested: ${share(1 - level())} ${data.source}, ${share(level())} ${data.target}`];
    for (const [key, title] of Object.entries(data.curves)) {
      const value = (shown(method()).curves[key] || [])[state.level];
      if (value === null || value === undefined) continue;
      if (key === "count") parts.push(`${value} nuclei`);
      else if (key === "area_fraction") parts.push(`${share(value)} of the patch is nuclei`);
      else parts.push(`${title.replace(" — ", " by ")} ${value.toFixed(2)}`);
    }
    find(".readout").replaceChildren(html("b", {}, at), ...parts.map((text) => html("span", {}, text)));
    slider.setAttribute("aria-valuetext", `${at} of 1`);
    find(".caption").textContent = `${at}, ${method().name}`;
  }

  function showReal() {
    const [place, real] = [find(".gallery"), realAt(level())];
    if (!place) return;
    place.hidden = !real;
    if (!real) return;
    find(".gallery-title").textContent = `Real patches of level ${level().toFixed(2)}`;
    const tiles = Array.from({ length: real.num }, (_, i) => tile(data, real.sprite, i, real.num, "a real patch", null));
    find(".patches").replaceChildren(...tiles);
  }

  function set(change) {
    const [before, at] = [{ ...state }, level()];
    const within = (value, num) => Math.max(0, Math.min(num - 1, value));
    Object.assign(state, change);
    state.source = within(state.source, data.sources.length);
    if (change.level === undefined) state.level = nearest(base(), at);  // methods may have levels of their own
    state.level = within(state.level, base().length);
    slider.max = base().length - 1;
    slider.value = state.level;
    select.value = state.source;
    radios.forEach((radio) => {
      radio.checked = Number(radio.value) === method().slot;
      radio.disabled = !source().shown[radio.value];
    });
    if (change.first || before.source !== state.source || before.slot !== state.slot) {
      drawLadder();
      drawCurves();
      find(".start").replaceChildren(picture(method(), 0));
    }
    find(".current").replaceChildren(picture(method(), state.level));
    find(".ladder").querySelectorAll("tr").forEach((row) => {
      [...row.children].forEach((cell, place) => cell.classList.toggle("here", place === state.level + 1));
    });
    const [here, wide] = [find(".ladder .here"), find(".ladder").parentElement];
    wide.scrollLeft = here.offsetLeft + (here.offsetWidth - wide.clientWidth) / 2;
    moveMarkers();
    readout();
    showReal();
  }

  slider.addEventListener("input", () => set({ level: Number(slider.value) }));
  select.addEventListener("change", () => set({ source: Number(select.value) }));
  find(".previous").addEventListener("click", () => set({ source: state.source - 1 }));
  find(".next").addEventListener("click", () => set({ source: state.source + 1 }));
  radios.forEach((radio) => radio.addEventListener("change", () => set({ slot: Number(radio.value) })));
  const outlined = () => root.classList.toggle("no-outlines", !(boxes && boxes.checked));
  if (boxes) boxes.addEventListener("change", outlined);
  outlined();
  set({ first: true, level: Math.floor((base().length - 1) / 2) });

  const moves = {
    ArrowLeft: () => set({ level: state.level - 1 }),
    ArrowRight: () => set({ level: state.level + 1 }),
    Home: () => set({ level: 0 }),
    End: () => set({ level: Infinity }),
  };
  const letters = {
    n: () => set({ source: state.source + 1 }),
    p: () => set({ source: state.source - 1 }),
    m: () => set({ slot: shownMethods()[(shownMethods().indexOf(method()) + 1) % shownMethods().length].slot }),
    ...(boxes && { o: () => boxes.click() }),
  };
  return {
    root,
    press(key, target) {
      const movesItself = target.closest("input[type=range], input[type=radio], select, textarea, video");
      const action = letters[key] || (!movesItself && moves[key]);
      if (action) action();
      return Boolean(action);
    },
  };
}

/* One of several pictures, chosen by name; without this script the first is shown. */
function picker(root) {
  const [select, figures] = [root.querySelector("select"), [...root.querySelectorAll("figure")]];
  function show(place) {
    select.value = Math.max(0, Math.min(figures.length - 1, place));
    figures.forEach((figure, k) => { figure.hidden = k !== Number(select.value); });
  }
  const step = (by) => () => show(Number(select.value) + by);
  const keys = { n: step(1), p: step(-1) };
  root.querySelector(".controls").hidden = false;
  root.querySelector(".next").addEventListener("click", keys.n);
  root.querySelector(".previous").addEventListener("click", keys.p);
  select.addEventListener("change", step(0));
  step(0)();
  return { root, press: (key) => Boolean(keys[key] && (keys[key](), true)) };
}

const viewers = [
  ...[...document.querySelectorAll(".viewer")].map(viewer),
  ...[...document.querySelectorAll(".picker")].map(picker),
];

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("select")) return;
  const inView = (one) => {
    const box = one.root.getBoundingClientRect();
    return box.bottom > 0 && box.top < window.innerHeight;
  };
  const one = viewers.find((each) => each.root.contains(event.target)) || viewers.find(inView);
  if (one && one.press(event.key, event.target)) event.preventDefault();
});

/* Paper cannot be unfolded. */
let closed = [];
const unfold = (open) => closed.forEach((one) => { one.open = open; });
window.addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  unfold(true);
});
window.addEventListener("afterprint", () => unfold(false));
