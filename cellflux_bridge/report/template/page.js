"use strict";

const SVG = "http://www.w3.org/2000/svg";
function svg(name, attributes, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function html(name, properties, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

/* One frame of a sprite (frames side by side), with the outlines of its nuclei above it. */
function tile(data, sprite, k, num, label, outline) {
  const image = svg("image", {
    href: sprite, x: -k * data.size, y: 0, width: num * data.size, height: data.size, preserveAspectRatio: "none",
  });
  const parts = [image];
  if (outline) {
    const paths = [svg("path", { class: "halo", d: outline }), svg("path", { class: "ring", d: outline })];
    parts.push(svg("g", { class: "nuclei", transform: "scale(.1)" }, ...paths));
  }
  const viewBox = `0 0 ${data.size} ${data.size}`;
  return svg("svg", { viewBox, role: "img", "aria-label": label, "data-frame": k, class: data.pixelated ? "pixelated" : "" }, ...parts);
}

function nearest(levels, level) {
  let best = 0;
  levels.forEach((one, k) => { if (Math.abs(one - level) < Math.abs(levels[best] - level) - 1e-9) best = k; });
  return best;
}

/* Where a chart's own curve (pixels) stands at a level. */
function onCurve(points, x) {
  for (let i = 1; i < points.length; i++) {
    const [a, b] = [points[i - 1], points[i]];
    if (x <= b[0] + 1e-6 && x >= a[0] - 1e-6) return b[0] > a[0] ? a[1] + (b[1] - a[1]) * (x - a[0]) / (b[0] - a[0]) : b[1];
  }
  return null;
}

function pointsOf(line) {
  return line.getAttribute("points").split(" ").map((pair) => pair.split(",").map(Number));
}

function chartScale(chart) {
  const of = (name) => Number(chart.dataset[name]);
  return {
    x: (level) => of("x0") + (of("x1") - of("x0")) * level,
    y: (value) => of("y0") + (of("y1") - of("y0")) * (value - of("v0")) / (of("v1") - of("v0")),
  };
}

function marker(d, style, x, y, isOther, size) {
  const path = svg("path", { class: "mark", d });
  return svg("g", { class: style + (isOther ? " other" : ""), transform: `translate(${x} ${y}) scale(${size})` }, path);
}

/* The key of a single sequence's curve: what follows the chapter and the chart's use. */
const curveKey = (chart) => chart.dataset.key.split("/").slice(2).join("/");

function viewer(root) {
  const data = JSON.parse(root.querySelector(".data").textContent);
  const find = (selector) => root.querySelector(selector);
  const chapter = root.closest(".chapter");
  const [slider, select, boxes] = [find(".level"), find(".source"), find(".outlines")];
  const radios = [...root.querySelectorAll(".methods input")];
  const own = [...root.querySelectorAll(".chart")];
  const others = [...chapter.querySelectorAll(".chart")].filter((chart) => !own.includes(chart));
  const state = { level: 0, source: 0, slot: data.methods[0].slot };

  const shownMethods = () => data.methods.filter((method) => data.sources[state.source].shown[method.slot]);
  const method = () => shownMethods().find((one) => one.slot === state.slot) || shownMethods()[0];
  const base = () => method().levels;
  const level = () => base()[state.level];
  const shown = (one) => data.sources[state.source].shown[one.slot];

  const mark = (style) => data.marks[Number(style.slice(1))];

  function realAt(at) {
    const levels = data.methods[0].levels;  // by whose numbers real patches are kept
    const k = nearest(levels, at);
    return Math.abs(levels[k] - at) < 0.03 ? data.real[k] : undefined;
  }

  function picture(one, k) {
    const of = shown(one);
    const label = `${one.name}, level ${one.levels[k]}, source ${data.sources[state.source].label}`;
    return tile(data, of.sprite, k, one.levels.length, label, of.outlines && of.outlines[k]);
  }

  function drawLadder() {
    const cells = (name, chosen, make) => {
      const row = html("tr", { className: chosen ? "chosen" : "" }, Object.assign(html("th", { textContent: name }), { scope: "row" }));
      base().forEach((at, k) => {
        const button = html("button", { type: "button", tabIndex: -1, onclick: () => set({ level: k }) });
        const content = make(at, k);
        if (content) button.append(content);
        row.append(html("td", {}, button));
      });
      return row;
    };
    const head = html("tr", {}, html("th", {}));
    base().forEach((at) => head.append(Object.assign(html("th", { textContent: at.toFixed(2) }), { scope: "col" })));
    const rows = shownMethods().map((one) => cells(one.name, one === method(), (at) => picture(one, nearest(one.levels, at))));
    if (Object.keys(data.real).length) {
      rows.push(cells("real, of that level", false, (at) => {
        const real = realAt(at);
        return real && tile(data, real.sprite, 0, real.num, `a real patch of level ${at}`, null);
      }));
    }
    find(".ladder").replaceChildren(html("table", {}, html("thead", {}, head), html("tbody", {}, ...rows)));
  }

  function drawCurves() {
    for (const chart of own) {
      const { x, y } = chartScale(chart);
      const lines = shownMethods().flatMap((one) => {
        const values = shown(one).curves[curveKey(chart)];
        if (!values) return [];
        const points = values.map((value, k) => (value === null ? null : `${x(one.levels[k]).toFixed(1)},${y(value).toFixed(1)}`));
        const kind = `line ${one.style}${one === method() ? "" : " other"}`;
        return [svg("polyline", { class: kind, points: points.filter((point) => point).join(" ") })];
      });
      // Of the means only the chosen method's: those of all together would hide the sequence.
      chart.querySelectorAll("[data-series]").forEach((mean) => mean.classList.toggle("away", mean.dataset.series !== method().name));
      lines.sort((a, b) => b.classList.contains("other") - a.classList.contains("other"));
      chart.querySelector(".own").replaceChildren(...lines);
    }
  }

  function moveMarkers() {
    for (const chart of [...own, ...others]) {
      const { x, y } = chartScale(chart);
      const [at, marks] = [x(level()), []];
      const cursor = chart.querySelector(".cursor");
      cursor.setAttribute("x1", at);
      cursor.setAttribute("x2", at);
      const drawn = new Set();
      if (own.includes(chart)) {
        for (const one of shownMethods()) {
          const values = shown(one).curves[curveKey(chart)];
          const k = nearest(one.levels, level());
          if (values && values[k] !== null) {
            marks.push(marker(mark(one.style), one.style, x(one.levels[k]), y(values[k]), one !== method(), one === method() ? 1.7 : 1.1));
            drawn.add(one.name);
          }
        }
      }
      for (const series of chart.querySelectorAll(".series")) {
        const { style, series: name } = series.dataset;
        if (!style.startsWith("m") || drawn.has(name) || series.classList.contains("away")) continue;
        const line = onCurve(pointsOf(series.querySelector("polyline")), at);
        if (line !== null) marks.push(marker(mark(style), style, at, line, false, 1.5));
      }
      marks.reverse();  // the chosen method, which comes first where it is the first, lies on top
      chart.querySelector(".now").replaceChildren(...marks);
    }
  }

  function readout() {
    const one = method(), of = shown(one), k = state.level;
    const share = (value) => `${Math.round(100 * value)} %`;
    const parts = [`asked: ${share(1 - level())} ${data.source}, ${share(level())} ${data.target}`];
    for (const [key, title] of Object.entries(data.curves)) {
      const value = of.curves[key] && of.curves[key][k];
      if (value === null || value === undefined) continue;
      if (key === "count") parts.push(`${value} nuclei`);
      else if (key === "area_fraction") parts.push(`${share(value)} of the patch is nuclei`);
      else parts.push(`${title.replace(" — ", " by ")} ${value.toFixed(2)}`);
    }
    const strong = html("b", { textContent: `level ${level().toFixed(2)}` });
    find(".readout").replaceChildren(strong, ...parts.map((text) => html("span", { textContent: text })));
    slider.setAttribute("aria-valuetext", `level ${level().toFixed(2)} of 1`);
    find(".caption").textContent = `level ${level().toFixed(2)}, ${one.name}`;
  }

  function showReal() {
    const place = find(".gallery");
    if (!place) return;
    const real = realAt(level());
    place.hidden = !real;
    if (!real) return;
    find(".gallery-title").textContent = `Real patches of level ${level().toFixed(2)}`;
    const tiles = Array.from({ length: real.num }, (_, i) => tile(data, real.sprite, i, real.num, "a real patch", null));
    find(".patches").replaceChildren(...tiles);
  }

  function set(change) {
    const [before, at] = [{ ...state }, level()];
    Object.assign(state, change);
    state.source = Math.max(0, Math.min(data.sources.length - 1, state.source));
    if (change.level === undefined) state.level = nearest(base(), at);  // methods may have levels of their own
    state.level = Math.max(0, Math.min(base().length - 1, state.level));
    slider.max = base().length - 1;
    slider.value = state.level;
    select.value = state.source;
    radios.forEach((radio) => {
      radio.checked = Number(radio.value) === method().slot;
      radio.disabled = !data.sources[state.source].shown[radio.value];
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
  return {
    root,
    press(key, target) {
      const movesItself = target.closest("input[type=range], input[type=radio], select, textarea, video");
      if (!movesItself && ["ArrowLeft", "ArrowRight"].includes(key)) set({ level: state.level + (key === "ArrowLeft" ? -1 : 1) });
      else if (!movesItself && ["Home", "End"].includes(key)) set({ level: key === "Home" ? 0 : Infinity });
      else if (key === "n" || key === "p") set({ source: state.source + (key === "n" ? 1 : -1) });
      else if (key === "m") {
        const here = shownMethods();
        set({ slot: here[(here.indexOf(method()) + 1) % here.length].slot });
      } else if (key === "o" && boxes) {
        boxes.checked = !boxes.checked;
        outlined();
      } else return false;
      return true;
    },
  };
}

const viewers = [...document.querySelectorAll(".viewer")].map(viewer);

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
window.addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  closed.forEach((one) => { one.open = true; });
});
window.addEventListener("afterprint", () => closed.forEach((one) => { one.open = false; }));
