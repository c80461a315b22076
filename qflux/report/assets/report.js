"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const given = JSON.parse(document.getElementById("explorer-data").textContent);
  const root = document.documentElement;
  const element = (id) => document.getElementById(id);
  // Without a pointer that hovers, plotly's buttons would always stand on the titles.
  const CONFIG = { responsive: true, displaylogo: false, displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false };
  const KEPT = "#0072B2", BOUND = "#D55E00", GREY = "#9a9a9a", QUERY = "#009E73";
  // Names of tokens are text, and plotly reads its texts as HTML.
  const escape = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  // Light and dark: what the system wants, until the button is pressed.
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => root.dataset.theme === "dark";
  const colors = () => {
    const style = getComputedStyle(root);
    const get = (name) => style.getPropertyValue(name).trim();
    return { ink: get("--ink"), grid: get("--grid"), line: get("--line") };
  };
  const themed = (layout) => {
    const { ink, grid, line } = colors();
    const axis = { gridcolor: grid, zerolinecolor: line, linecolor: line, color: ink };
    const made = {
      ...layout,
      title: { ...layout.title, x: 0, xanchor: "left", xref: "paper" },
      font: { ...layout.font, color: ink },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: line, activecolor: ink },
    };
    for (const name of Object.keys(layout).filter((name) => /^[xy]axis/.test(name)))
      made[name] = { ...layout[name], ...axis };
    if (layout.polar) {
      made.polar = { ...layout.polar };
      for (const name of ["angularaxis", "radialaxis"])
        made.polar[name] = { ...layout.polar[name], gridcolor: grid, linecolor: line, color: ink };
    }
    if (layout.scene) {
      made.scene = { ...layout.scene };
      for (const name of ["xaxis", "yaxis", "zaxis"])
        made.scene[name] = { ...layout.scene[name], ...axis };
    }
    return made;
  };

  // The dark end of the scale would not be seen on dark paper.
  const scale = () => isDark() ? [[0, "#3f77b8"], [0.5, "#a5a39a"], [1, "#fde737"]] : "Cividis";
  // In what the program wrote, the name has become the list of its colours.
  const isCividis = (colors) => Array.isArray(colors) && colors[0][1] === "#00224e";
  const coloured = (part) => isCividis(part.colorscale) ? { ...part, colorscale: scale() } : part;
  const themedData = (data) => data.map((trace) =>
    trace.marker ? { ...trace, marker: coloured(trace.marker) } : coloured(trace));

  const drawn = new Map();
  const draw = (place) => {
    const { data, layout } = figures[place.dataset.picture][Number(place.dataset.panel)];
    drawn.set(place, layout);
    Plotly.react(place, themedData(data), themed(layout), CONFIG).then(() => { place.dataset.drawn = "yes"; });
  };
  const places = [...document.querySelectorAll(".plot[data-picture]")];
  // Only what comes into view is drawn: three-dimensional views are few, and phones are slow.
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries)
      if (entry.isIntersecting) { watcher.unobserve(entry.target); draw(entry.target); }
  }, { rootMargin: "300px" });

  const setTheme = (dark) => {
    root.dataset.theme = dark ? "dark" : "light";
    element("theme").textContent = dark ? "Light" : "Dark";
    element("theme").setAttribute("aria-pressed", String(dark));
    // What is in view at once, the rest when it comes into view.
    for (const place of drawn.keys()) watcher.observe(place);
    if (layers.length) { drawPlane(); drawHeat(); }
  };

  // The explorer: layer, cylinder and token, and what that token hears.
  const floats = (array) => {
    const bytes = Uint8Array.from(atob(array.float32), (c) => c.charCodeAt(0));
    return { shape: array.shape, values: new Float32Array(bytes.buffer) };
  };
  const layers = given.layers.map((layer) =>
    Object.fromEntries(Object.entries(layer).map(([name, array]) => [name, floats(array)])));
  const labels = given.labels, surprise = floats(given.surprise).values, count = labels.length;
  const name = (token) => `“${labels[token]}” (token ${token + given.first})`;
  const state = { layer: given.layer ?? 0, cylinder: given.cylinder, token: Math.floor(count / 2) };
  const buttons = [];

  const point = (array, token) => {
    const at = 2 * (state.cylinder * array.shape[1] + token);
    return [array.values[at], array.values[at + 1]];
  };
  const bound = (array, token) => array.values[state.cylinder * array.shape[1] + token];
  const weightOf = (row, key) => {
    const { shape, values } = layers[state.layer].weight;
    return values[state.cylinder * shape[1] + row * (row + 1) / 2 + key];
  };
  // The kept keys of a row with their weights, the heaviest first.
  const heard = (row) => {
    const found = [];
    for (let key = 0; key <= row; key++) {
      const weight = weightOf(row, key);
      if (!Number.isNaN(weight)) found.push({ key, weight });
    }
    return found.sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight) || a.key - b.key);
  };

  const showRow = () => {
    const row = state.token, found = heard(row);
    const top = found.length ? Math.abs(found[0].weight) : 1;
    const weights = new Map(found.map(({ key, weight }) => [key, weight]));
    buttons.forEach((button, key) => {
      const weight = weights.get(key);
      const kind = key > row ? "later" : weight === undefined ? "dropped" : "kept";
      button.className = kind + (weight < 0 ? " negative" : "") + (key === row ? " chosen" : "");
      button.style.setProperty("--weight", kind === "kept" ? (0.1 + 0.5 * Math.abs(weight) / (top || 1)).toFixed(3) : "0");
      button.tabIndex = key === row ? 0 : -1;
      button.setAttribute("aria-selected", String(key === row));
    });
    const { low, high } = layers[state.layer];
    const from = bound(low, row), to = bound(high, row);
    const limit = Number.isFinite(from) && Number.isFinite(to) ? `It keeps products from ${from.toPrecision(4)} to ${to.toPrecision(4)}.`
      : Number.isFinite(from) ? `It keeps products from ${from.toPrecision(4)} on.`
      : Number.isNaN(from) ? "Its numbers are not finite." : "It drops nothing.";
    const nats = Number.isNaN(surprise[row]) ? "" : `, a surprise of ${surprise[row].toPrecision(3)} nats,`;
    element("status").textContent = `${name(row)}${nats} hears ${found.length} of ${row + 1} tokens. ${limit}`;
    element("heard").replaceChildren(...found.slice(0, 24).map(({ key, weight }) => {
      const item = document.createElement("li");
      item.dataset.key = key;
      item.dataset.weight = weight;
      item.textContent = `${name(key)}: ${weight.toPrecision(4)}`;
      return item;
    }));
    for (const id of ["layer", "cylinder", "token"]) {
      element(id).value = state[id];
      document.querySelector(`output[for=${id}]`).textContent = state[id] + (id === "token" ? given.first : 0);
    }
  };

  // The part of a square around the origin with low <= direction . p <= high.
  const halfPlane = (direction, low, high, reach) => {
    let corners = [[-reach, -reach], [reach, -reach], [reach, reach], [-reach, reach]];
    for (const [sign, limit] of [[1, low], [-1, -high]]) {
      if (!Number.isFinite(limit)) continue;
      const side = (p) => sign * (direction[0] * p[0] + direction[1] * p[1]) - limit;
      const kept = [];
      corners.forEach((p, i) => {
        const q = corners[(i + 1) % corners.length], a = side(p), b = side(q);
        if (a >= 0) kept.push(p);
        if ((a >= 0) !== (b >= 0)) kept.push([0, 1].map((n) => p[n] + (q[n] - p[n]) * a / (a - b)));
      });
      corners = kept;
    }
    return corners;
  };

  const axes = (x, y) => ({
    margin: { l: 45, r: 10, t: 40, b: 45 }, height: 420, hovermode: "closest",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    legend: { orientation: "h", y: -0.2, font: { size: 11 } },
    xaxis: { title: { text: x } }, yaxis: { title: { text: y } },
  });

  const drawPlane = () => {
    const { keys, direction, low, high } = layers[state.layer], row = state.token;
    const groups = { kept: [], dropped: [], later: [] };
    let reach = 0;
    for (let key = 0; key < count; key++) {
      const place = point(keys, key);
      if (!place.every(Number.isFinite)) continue;
      reach = Math.max(reach, Math.abs(place[0]), Math.abs(place[1]));
      const kind = key > row ? "later" : Number.isNaN(weightOf(row, key)) ? "dropped" : "kept";
      groups[kind].push({ key, place });
    }
    reach = 1.15 * (reach || 1);
    const way = point(direction, row);
    const region = way.every(Number.isFinite) ? halfPlane(way, bound(low, row), bound(high, row), reach) : [];
    if (region.length) region.push(region[0]);
    const style = { kept: ["circle", KEPT], dropped: ["circle-open", GREY], later: ["x-thin-open", GREY] };
    const size = Math.hypot(...way) || 1, tip = way.map((v) => v / size * reach / 2);
    const traces = [
      { name: "half-plane", type: "scatter", mode: "lines", fill: "toself", hoverinfo: "skip",
        x: region.map((p) => p[0]), y: region.map((p) => p[1]),
        fillcolor: "rgba(213,94,0,0.13)", line: { color: BOUND, width: 2 } },
      ...Object.entries(groups).map(([kind, members]) => ({
        name: `${kind} (${members.length})`, type: "scatter", mode: "markers",
        x: members.map((m) => m.place[0]), y: members.map((m) => m.place[1]),
        customdata: members.map((m) => m.key), hoverinfo: "text",
        hovertext: members.map((m) => escape(name(m.key)) + (kind === "kept" ? `<br>weight ${weightOf(row, m.key).toPrecision(4)}` : "")),
        marker: { symbol: style[kind][0], color: style[kind][1], size: 8 },
      })),
      { name: "query", type: "scatter", mode: "lines+markers", hoverinfo: "skip",
        x: [0, tip[0]], y: [0, tip[1]], line: { color: QUERY, width: 3 },
        marker: { symbol: ["circle", "triangle-up"], size: [1, 12], angleref: "previous" } },
    ];
    const layout = axes("x", "y");
    layout.title = { text: `keys, and what ${escape(name(row))} keeps`, font: { size: 14 } };
    Object.assign(layout.xaxis, { range: [-reach, reach] });
    Object.assign(layout.yaxis, { range: [-reach, reach], scaleanchor: "x" });
    return Plotly.react("plane", traces, themed(layout), CONFIG);
  };

  const rowMark = () => [{
    type: "rect", xref: "x", yref: "y", x0: -0.5, x1: state.token + 0.5, y0: state.token - 0.5,
    y1: state.token + 0.5, line: { color: BOUND, width: 2 },
  }];
  const drawHeat = () => {
    const values = [], mask = [], sizes = [];
    let negative = false;
    for (let row = 0; row < count; row++) {
      const line = new Array(count).fill(null), grey = new Array(count).fill(null);
      for (let key = 0; key <= row; key++) {
        const weight = weightOf(row, key);
        if (Number.isNaN(weight)) grey[key] = 0;
        else { line[key] = weight; sizes.push(Math.abs(weight)); negative = negative || weight < 0; }
      }
      values.push(line);
      mask.push(grey);
    }
    // The first rows have few keys and so large weights, beside which all others would look the same.
    sizes.sort((a, b) => a - b);
    const top = sizes[sizes.length - 1] || 1, most = sizes[Math.floor(0.99 * (sizes.length - 1))] || top;
    const bar = { thickness: 10, ...(most < top ? { title: { text: `largest<br>${top.toPrecision(2)}`, font: { size: 11 } } } : {}) };
    const shade = "rgba(140,140,140,0.45)";
    const every = Math.ceil(count / 24), at = labels.map((_, i) => i).filter((i) => i % every === 0);
    const ticks = { tickmode: "array", tickvals: at, ticktext: at.map((i) => escape(labels[i])), tickfont: { size: 10 },
      ...(labels.every((label) => label.length <= 2) ? { tickangle: 0 } : {}), showgrid: false, zeroline: false };
    const layout = axes("heard token", "hearing token");
    layout.title = { text: `weights in layer ${state.layer}, cylinder ${state.cylinder}`, font: { size: 14 } };
    Object.assign(layout.xaxis, ticks);
    Object.assign(layout.yaxis, ticks, { range: [count - 0.5, -0.5] });
    layout.shapes = rowMark();
    return Plotly.react("heat", [
      { type: "heatmap", z: mask, colorscale: [[0, shade], [1, shade]], showscale: false, hoverinfo: "skip" },
      { type: "heatmap", z: values, hoverongaps: false, colorscale: negative ? "PuOr" : scale(),
        zmin: negative ? -most : 0, zmax: most, colorbar: bar,
        hovertemplate: "row %{y}, column %{x}<br>%{z:.4g}<extra></extra>" },
    ], themed(layout), CONFIG);
  };

  const choose = (changes) => {
    const before = { ...state };
    Object.assign(state, changes);
    if (Object.keys(state).every((key) => before[key] === state[key])) return;
    showRow();
    drawPlane();
    if (before.layer !== state.layer || before.cylinder !== state.cylinder) drawHeat();
    else Plotly.relayout("heat", { shapes: rowMark() });
  };

  const startExplorer = () => {
    const limits = { layer: layers.length, cylinder: layers[0].low.shape[0], token: count };
    for (const [id, size] of Object.entries(limits)) {
      const slider = element(id);
      slider.max = size - 1;
      slider.disabled = size === 1;
      slider.addEventListener("input", () => choose({ [id]: Number(slider.value) }));
    }
    labels.forEach((label, token) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = label;
      button.setAttribute("role", "option");
      button.setAttribute("aria-label", name(token));
      for (const event of ["pointerenter", "focus", "click"])
        button.addEventListener(event, () => choose({ token }));
      buttons.push(button);
      element("tokens").append(button);
      if (label === "↵") element("tokens").append(document.createElement("br"));
    });
    element("tokens").addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -count, End: count }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      buttons[Math.min(count - 1, Math.max(0, state.token + step))].focus();
    });
    showRow();
    Promise.all([drawPlane(), drawHeat()]).then(() => {
      element("plane").on("plotly_click", ({ points }) => {
        if (points[0].customdata !== undefined) choose({ token: points[0].customdata });
      });
      element("heat").on("plotly_click", ({ points }) => choose({ token: points[0].y }));
      root.dataset.ready = "yes";
    });
  };

  root.dataset.theme = system.matches ? "dark" : "light";
  if (layers.length) startExplorer();
  else { element("explorer").hidden = true; root.dataset.ready = "yes"; }
  setTheme(system.matches);
  system.addEventListener("change", (event) => setTheme(event.matches));
  element("theme").addEventListener("click", () => setTheme(!isDark()));
  for (const place of places) watcher.observe(place);
  window.addEventListener("beforeprint", () => places.forEach(draw));
})();
