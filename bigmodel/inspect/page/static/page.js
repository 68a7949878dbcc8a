// The page of `bigmodel report --html`. Data come from the JSON element, and with --serve again from data.json.
// Everything that a run has written is put into the document as text, never as HTML.
"use strict";
(() => {
  const HEIGHT = 220, FONT = "12px system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', Arial, sans-serif";
  const DASHES = [[], [7, 3], [2, 3], [9, 3, 2, 3], [12, 4], [4, 2, 1, 2]];
  const SCALES = {
    bytes: [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "B"]],
    seconds: [[3600, "h"], [1, "s"], [1e-3, "ms"], [1e-6, "µs"]],
    share: [[0.01, "%"]],
    step: [[1e4, "k", 1e3], [0, "", 1]],
    "": [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k", 1e3], [1e-3, "", 1]],
  };
  const EMPTY = "\u00a0";  // keeps the height of its line
  const WHOLE = [...Array(10).keys()].flatMap((power) => [1, 2, 5].map((one) => one * 10 ** power));  // between marks of steps
  const THEMES = ["automatic", "light", "dark"];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const hidden = new Map();          // plot and label -> whether the line is hidden: stays when new data come
  const wholeRange = new Set();      // plots whose single peaks are in view
  const zooms = { step: null, time: null };
  let cards = [], data, theme = "automatic", zooming = false, timer, shown = "data.json";

  const byId = (id) => document.getElementById(id);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const isDark = () => document.documentElement.dataset.theme === "dark";
  const shade = (colour) => (isDark() && data.dark[colour]) || colour;

  function make(tag, properties = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name === "style") Object.assign(made.style, value);
      else if (name.startsWith("aria-") || name === "role" || name === "scope") made.setAttribute(name, value);
      else made[name] = value;
    }
    made.append(...children);
    return made;
  }

  function numbers(text, Kind) {
    const bytes = Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
    return new Kind(bytes.buffer);
  }

  // ---- numbers in words -------------------------------------------------------------------------------------------

  function scaleOf(most, scale) {
    const found = SCALES[scale].find(([from]) => most >= from) || SCALES[scale].at(-1);
    return { divisor: found[2] || found[0], unit: found[1] };
  }

  function words(value, scale) {
    if (value == null || !Number.isFinite(value)) return "–";
    const size = Math.abs(value);
    if (scale === "" && size > 0 && (size < 1e-3 || size >= 1e15)) return value.toExponential(3);
    if (scale === "" && size < 1e6) return String(Number(value.toPrecision(size >= 1e4 ? 6 : size >= 0.1 ? 5 : 4)));
    const { divisor, unit } = size ? scaleOf(size, scale) : { divisor: 1, unit: "" };
    return `${Number((value / divisor).toPrecision(4))}${unit === "%" ? unit : unit && ` ${unit}`}`;
  }

  // Marks of an axis: as many decimals as the distance between two marks needs, so that no two read alike.
  function marksOfAxis(scale) {
    return (u, splits, axis, space, distance) => {
      const most = Math.max(...splits.map(Math.abs));
      if (scale === "" && most > 0 && most < 1e-3) {
        const digits = Math.max(0, Math.ceil(Math.log10(most / distance)));
        return splits.map((value) => (value === 0 ? "0" : value.toExponential(Math.min(digits, 8))));
      }
      const { divisor, unit } = scaleOf(most, scale);
      let decimals = 0;  // a distance of 0.25 has two
      while (decimals < 9 && Math.abs(Math.round(distance / divisor * 10 ** decimals) / 10 ** decimals - distance / divisor) > 1e-6 * distance / divisor) decimals++;
      return splits.map((value) => `${(value / divisor).toFixed(decimals)}${unit && value ? (unit === "%" ? unit : ` ${unit}`) : ""}`);
    };
  }

  // ---- zoom: one for all plots over steps, one for those over time --------------------------------------------------

  function zoomTo(kind, range) {
    zooms[kind] = range;
    zooming = true;
    for (const card of cards) if (card.plot && card.x === kind) card.show(range);
    zooming = false;
    byId("reset").disabled = !Object.values(zooms).some(Boolean);
    if (data.live_seconds) askIn(0.3);  // for the points between
  }

  function resetZoom() {
    for (const kind of Object.keys(zooms)) zoomTo(kind, null);
  }

  function onKey(card, event) {
    const { min, max } = card.plot.scales.x, width = max - min, [first, last] = card.extent();
    const moves = {
      "+": [min + width / 4, max - width / 4], "=": [min + width / 4, max - width / 4],
      "-": [min - width / 2, max + width / 2],
      ArrowLeft: [min - width / 5, max - width / 5], ArrowRight: [min + width / 5, max + width / 5],
    };
    if (event.key === "0" || event.key === "Escape") resetZoom();
    else if (event.key in moves) {
      const [from, to] = moves[event.key];
      const range = [Math.max(first, from), Math.min(last, to)];
      if (range[1] > range[0]) zoomTo(card.x, range[0] <= first && range[1] >= last ? null : range);
    } else return;
    event.preventDefault();
  }

  // ---- plots ----------------------------------------------------------------------------------------------------------

  function frame(block, ...more) {
    const place = make("span", { className: "place", textContent: EMPTY });
    const head = make("div", { className: "head" }, make("h3", { textContent: block.title, id: `h-${slug(block.name)}` }));
    if (block.unit) head.append(make("span", { className: "unit", textContent: block.unit }));
    head.append(place);
    const body = make("figure", { className: "card", role: "group", "aria-labelledby": `h-${slug(block.name)}` }, head, ...more);
    if (block.note) body.append(make("p", { className: "note", textContent: block.note }));
    return { body, place, head };
  }

  function axes(block, unitOfX) {
    const common = {
      stroke: css("--soft"), font: FONT, grid: { stroke: css("--grid"), width: 1 },
      ticks: { stroke: css("--line"), width: 1, size: 4 },
    };
    const whole = block.x === "step" ? { incrs: WHOLE } : {};
    const x = { ...common, ...whole, values: marksOfAxis(block.x === "time" ? "seconds" : "step"), size: 32, space: 60, label: unitOfX, labelSize: 16, labelFont: FONT, labelGap: -4 };
    return [x, { ...common, values: marksOfAxis(block.scale), size: 62, space: 34 }];
  }

  function drawMarks(u, marks) {
    const { ctx, bbox } = u;
    ctx.save();
    ctx.strokeStyle = css("--soft");
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash([4 * devicePixelRatio, 4 * devicePixelRatio]);
    for (const mark of marks) {
      if (mark < u.scales.x.min || mark > u.scales.x.max) continue;
      const x = Math.round(u.valToPos(mark, "x", true));
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  }

  // The first and the last place of all lines: plots over steps have one axis, also with a value at every 100th step only.
  function extentOf(cards) {
    const ends = cards.flatMap(({ block }) => block.lines || []).filter((line) => line.xs.length)
      .flatMap((line) => [line.xs[0], line.xs.at(-1)]);
    return [Math.min(...ends), Math.max(...ends)];
  }

  // What lines and heat maps share: the uPlot in its box, its size, zoom and keys.
  function watch(card, block, options, values) {
    card.box.tabIndex = 0;
    const unitOfX = block.x === "time" ? "time since the first start" : "step";
    const common = {
      width: Math.max(200, card.box.clientWidth), height: HEIGHT, legend: { show: false }, axes: axes(block, unitOfX),
      padding: [8, 20, 0, 0],  // half of the last mark of the x axis is right of it
    };
    const hooks = options.hooks || {};
    hooks.setScale = [(u, key) => {
      if (key !== "x" || zooming || !card.plot) return;
      const { min, max } = u.scales.x, [first, last] = card.extent();
      zoomTo(card.x, min <= first && max >= last ? null : [min, max]);
    }];
    card.plot = new uPlot({ ...common, ...options, hooks }, values, card.box);
    card.plot.root.setAttribute("aria-hidden", "true");
    card.show = (range) => {
      const [first, last] = card.extent();
      card.plot.setScale("x", range ? { min: range[0], max: range[1] } : { min: first, max: last });
    };
    card.resize = () => card.plot.setSize({ width: Math.max(200, card.box.clientWidth), height: HEIGHT });
    zooming = true;
    card.show(zooms[card.x]);
    zooming = false;
  }

  function swatch(line) {
    const space = "http://www.w3.org/2000/svg", svg = document.createElementNS(space, "svg");
    svg.setAttribute("width", 22); svg.setAttribute("height", 10); svg.setAttribute("aria-hidden", "true");
    const stroke = document.createElementNS(space, "line");
    const look = { x1: 0, x2: 22, y1: 5, y2: 5, stroke: shade(line.colour), "stroke-width": line.stack ? 10 : line.thin ? 2 : 3 };
    for (const [name, value] of Object.entries(look)) stroke.setAttribute(name, value);
    if (line.dash) stroke.setAttribute("stroke-dasharray", DASHES[line.dash % DASHES.length].join(" "));
    svg.append(stroke);
    return svg;
  }

  function decode(block) {
    for (const line of block.lines) {
      line.xs = Array.from(numbers(line.x, Float64Array));
      line.ys = Array.from(numbers(line.y, Float32Array), (y) => (Number.isFinite(y) ? y : null));
    }
  }

  const nameOf = (block, line) => `${block.name}\n${line.label}`;
  const isShown = (block, line) => !(hidden.get(nameOf(block, line)) ?? !line.shown);

  // The columns for uPlot: x, then a column per line. Stacks are drawn from the whole sum down to the first share.
  function columns(block) {
    if (block.kind !== "stack") {
      if (block.lines.length === 1) return [block.lines[0].xs, block.lines[0].ys];
      return uPlot.join(block.lines.map((line) => [line.xs, line.ys]));
    }
    const sums = block.lines[0].xs.map(() => 0), made = [];
    for (const line of block.lines) {
      if (isShown(block, line)) line.ys.forEach((y, place) => { sums[place] += y || 0; });
      made.unshift([...sums]);
    }
    return [block.lines[0].xs, ...made];
  }

  // uPlot's index of the last value of a line that is at or before the cursor's place, or the next one after it.
  function nearest(u, number, place) {
    const values = u.data[number];
    for (let away = 0; away < values.length; away++) {
      if (values[place - away] != null) return place - away;
      if (values[place + away] != null) return place + away;
    }
    return place;
  }

  function seriesOf(block) {
    const stack = block.kind === "stack", lines = stack ? [...block.lines].reverse() : block.lines;
    return lines.map((line) => ({
      label: line.label, show: isShown(block, line), stroke: shade(line.colour), dash: DASHES[line.dash % DASHES.length],
      width: stack ? 0 : line.thin ? 1 : 1.8, fill: stack ? shade(line.colour) : undefined,
      paths: stack ? uPlot.paths.stepped({ align: -1 }) : undefined, points: { show: line.dots, size: 5, fill: css("--card") },
    }));
  }

  function rangeOfY(block) {
    return (u, low, high) => {
      if (low == null) return [0, 1];
      const whole = wholeRange.has(block.name) || zooms[block.x];
      if (block.kind === "stack" && block.scale === "share") return [0, 1];
      if (block.top != null && !whole) high = Math.min(high, block.top);
      if (block.from_zero) low = Math.min(0, low);
      const margin = 0.06 * (high - low) || Math.abs(high) * 0.05 || 1;
      return [block.from_zero ? low : low - margin, high + margin];
    };
  }

  // What a key shows while nothing is pointed at: the last value; over time, in stretches of equal length, their mean.
  function resting(block, line) {
    return block.x === "time" ? line.ys.reduce((sum, y) => sum + (y || 0), 0) / line.ys.length : line.ys.at(-1);
  }

  function lineCard(block) {
    const box = make("div", { className: "canvas", role: "img" }), keys = make("div", { className: "keys" });
    const { body, place, head } = frame(block, box, keys);
    const card = { block, body, box, x: block.x };
    let values = [];

    function describe() {
      const shown = block.lines.filter((line) => isShown(block, line));
      const last = shown.map((line) => `${line.label} ${words(resting(block, line), block.scale)}`).join(", ");
      box.setAttribute("aria-label", `${block.title}, ${block.unit}. ${block.x === "time" ? "Of the whole time" : "Last values"}: ${last}. Keys: plus and minus zoom, arrows move, 0 shows the whole run.`);
    }

    function toggle(line, button) {
      const show = !isShown(block, line);
      hidden.set(nameOf(block, line), !show);
      button.setAttribute("aria-pressed", show);
      const place = block.lines.indexOf(line), number = block.kind === "stack" ? block.lines.length - place : place + 1;
      card.plot.setSeries(number, { show });
      if (block.kind === "stack") setValues(columns(block));
      describe();
    }

    function makeKeys() {
      values = [];
      keys.replaceChildren(...block.lines.map((line) => {
        line.stack = block.kind === "stack";
        const value = make("span", { className: "value" });
        values.push(value);
        const button = make("button", { type: "button", className: "key", "aria-pressed": isShown(block, line) },
          swatch(line), make("span", { className: "label", textContent: line.label }), value);
        button.addEventListener("click", () => toggle(line, button));
        return button;
      }));
      if (block.top != null) {
        const button = make("button", { type: "button", className: "view", textContent: "with single peaks", "aria-pressed": wholeRange.has(block.name) });
        button.addEventListener("click", () => {
          if (!wholeRange.delete(block.name)) wholeRange.add(block.name);
          button.setAttribute("aria-pressed", wholeRange.has(block.name));
          setValues(card.plot.data);
        });
        keys.append(button);
      }
    }

    function setValues(columns) {
      zooming = true;
      card.plot.setData(columns, false);
      card.show(zooms[card.x]);
      zooming = false;
    }

    function readOut(u) {
      const at = u.cursor.left >= 0 && u.cursor.idx != null;
      place.textContent = at ? block.x === "time" ? `after ${words(u.data[0][u.cursor.idx], "seconds")}` : `step ${u.data[0][u.cursor.idx]}` : EMPTY;
      block.lines.forEach((line, number) => {
        const from = at ? nearest(u, number + 1, u.cursor.idx) : 0;
        const value = !at ? resting(block, line) : block.kind === "stack" ? line.ys[from] : u.data[number + 1][from];
        values[number].textContent = words(value, block.scale);
      });
    }

    card.extent = () => {
      const [first, last] = extentOf(block.x === "step" ? cards.filter(({ x }) => x === "step") : [card]);
      return last > first ? [first, last] : [first - 1, first + 1];
    };
    card.build = () => {
      makeKeys();
      describe();
      card.plot?.destroy();
      card.plot = null;
      const options = {
        scales: { x: { time: false }, y: { range: rangeOfY(block) } },
        series: [{}, ...seriesOf(block)],
        cursor: {
          sync: { key: block.x, setSeries: false }, drag: { x: true, y: false }, focus: { prox: -1 }, dataIdx: nearest,
          points: { show: block.kind !== "stack" },
        },
        hooks: { draw: [(u) => drawMarks(u, block.marks)], setCursor: [readOut] },
      };
      watch(card, block, options, columns(block));
      readOut(card.plot);
    };
    card.update = (next) => {
      if (next.lines.length !== block.lines.length || next.lines.some((line, n) => line.label !== block.lines[n].label)) return false;
      decode(next);
      Object.assign(block, next);
      setValues(columns(block));
      makeKeys();
      describe();
      readOut(card.plot);
      return true;
    };
    decode(block);
    box.addEventListener("keydown", (event) => onKey(card, event));
    return card;
  }

  // ---- heat maps --------------------------------------------------------------------------------------------------------

  function heatColour(share) {
    const stops = data.heat, at = Math.min(0.999, Math.max(0, share)) * (stops.length - 1), low = Math.floor(at);
    const parts = [stops[low], stops[low + 1]].map((one) => [1, 3, 5].map((place) => parseInt(one.slice(place, place + 2), 16)));
    return `rgb(${parts[0].map((value, n) => Math.round(value + (parts[1][n] - value) * (at - low))).join(",")})`;
  }

  function heatCard(block) {
    const box = make("div", { className: "canvas", role: "img" }), ramp = make("canvas", { width: 128, height: 1 });
    const most = make("span"), legend = make("div", { className: "scale" }, make("span", { textContent: "0" }), ramp, most);
    const { body, place } = frame(block, box, legend);
    body.classList.add("wide");
    const card = { block, body, box, x: block.x };
    let edges, cells, rows, top;

    function read() {
      edges = Array.from(numbers(block.edges, Float64Array));
      cells = numbers(block.cells, Float32Array);
      rows = cells.length / (edges.length - 1);
      const sorted = Float32Array.from(cells.filter((value) => value > 0)).sort();
      top = sorted.length ? sorted[Math.floor(0.98 * (sorted.length - 1))] : 1;
      most.textContent = `${words(top, block.scale)} and more; the most ${words(sorted.at(-1) || 0, block.scale)}`;
      box.setAttribute("aria-label", `${block.title}, ${block.unit}, a row per ${block.row}. Keys: plus and minus zoom, arrows move, 0 shows the whole run.`);
    }

    function paint(u) {
      const { ctx, bbox } = u;
      ctx.save();
      ctx.beginPath();
      ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
      ctx.clip();
      for (let column = 0; column < edges.length - 1; column++) {
        const left = Math.floor(u.valToPos(edges[column], "x", true)), right = Math.ceil(u.valToPos(edges[column + 1], "x", true));
        if (right < bbox.left || left > bbox.left + bbox.width) continue;
        for (let row = 0; row < rows; row++) {
          const value = cells[column * rows + row];
          if (!(value > 0)) continue;
          const above = u.valToPos(row * block.height - 0.5, "y", true), below = u.valToPos((row + 1) * block.height - 0.5, "y", true);
          ctx.fillStyle = heatColour(value / top);
          ctx.fillRect(left, Math.min(above, below), Math.max(1, right - left), Math.abs(below - above));
        }
      }
      ctx.restore();
      drawMarks(u, block.marks);
    }

    function readOut(u) {
      const x = u.posToVal(u.cursor.left, "x"), row = Math.floor((u.posToVal(u.cursor.top, "y") + 0.5) / block.height);
      const column = edges.findIndex((edge, n) => n + 1 < edges.length && x >= edge && x < edges[n + 1]);
      if (u.cursor.left < 0 || column < 0 || row < 0 || row >= rows) { place.textContent = EMPTY; return; }
      const first = row * block.height, last = Math.min(block.rows, first + block.height) - 1;
      const names = first === last ? `${block.row} ${first}` : `${block.row}s ${first} to ${last}`;
      const steps = `steps ${Math.ceil(edges[column])} to ${Math.floor(edges[column + 1])}`;
      place.textContent = `${names}, ${steps}: ${words(cells[column * rows + row], block.scale)}`;
    }

    card.extent = () => [edges[0], edges.at(-1)];
    card.build = () => {
      const context = ramp.getContext("2d");
      for (let x = 0; x < 128; x++) { context.fillStyle = heatColour(x / 127); context.fillRect(x, 0, 1, 1); }
      card.plot?.destroy();
      card.plot = null;
      const options = {
        scales: { x: { time: false }, y: { range: () => [-0.5, block.rows - 0.5], dir: -1 } },
        series: [{}, { show: true, paths: () => null, points: { show: false } }],
        cursor: { sync: { key: block.x, setSeries: false }, drag: { x: true, y: false }, points: { show: false } },
        hooks: { draw: [paint], setCursor: [readOut] },
      };
      watch(card, block, options, [edges, edges.map(() => 0)]);
      card.plot.axes[1].values = (u, splits) => splits.map((value) => (Number.isInteger(value) ? `${block.row} ${value}` : ""));
      card.plot.redraw(false, true);
    };
    card.update = (next) => {
      Object.assign(block, next);
      read();
      zooming = true;
      card.plot.setData([edges, edges.map(() => 0)], false);
      card.show(zooms[card.x]);
      zooming = false;
      return true;
    };
    read();
    box.addEventListener("keydown", (event) => onKey(card, event));
    return card;
  }

  // ---- tables and texts ---------------------------------------------------------------------------------------------------

  function tableOf(block) {
    const cell = (text, column, first) => {
      if (first && block.head) return make("th", { scope: "row", textContent: text });
      if (block.code?.includes(column)) return make("td", {}, make("code", { textContent: text }));
      return make("td", { textContent: text });
    };
    const rows = block.rows.map((row, number) => {
      const made = make("tr", {}, ...row.map((text, column) => cell(text, column, column === 0)));
      if (block.bars) made.firstChild.prepend(make("span", { className: "chip", style: { background: shade(block.bars[number].colour) } }));
      return made;
    });
    const titles = block.columns.map((text) => make("th", { scope: "col", textContent: text }));
    const made = make("table", { className: block.head ? "facts" : "" }, make("thead", {}, make("tr", {}, ...titles)), make("tbody", {}, ...rows));
    return make("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": block.title }, made);
  }

  function barOf(block) {
    const spans = block.bars.map((bar) => make("span", {
      title: `${bar.label}: ${words(bar.share, "share")}`, style: { background: shade(bar.colour), flex: `${bar.share} 0 0` },
    }));
    return make("div", { className: "bar", role: "img", "aria-label": block.rows.map((row) => row.join(" ")).join(", ") }, ...spans);
  }

  function textCard(block) {
    const card = { block, body: make("div", { className: "card wide" }) };
    card.build = () => {
      const wasOpen = card.body.querySelector("details")?.open;
      const parts = block.kind === "text" ? [make("pre", { textContent: block.text, tabIndex: 0 })] : [tableOf(block)];
      if (block.bars) parts.unshift(barOf(block));
      if (block.folded) {
        const details = make("details", {}, make("summary", { textContent: `${block.title} (${block.rows.length})` }), ...parts);
        details.open = Boolean(wasOpen);
        card.body.replaceChildren(details);
      } else card.body.replaceChildren(make("div", { className: "head" }, make("h3", { textContent: block.title })), ...parts);
    };
    card.update = (next) => {
      if (JSON.stringify(next) !== JSON.stringify(block)) { Object.assign(block, next); card.build(); }
      return true;
    };
    return card;
  }

  // ---- the page -------------------------------------------------------------------------------------------------------------

  const cardOf = (block) => (block.kind === "heat" ? heatCard : block.lines ? lineCard : textCard)(block);
  const slug = (title) => title.toLowerCase().replace(/[^a-z0-9]+/g, "-");
  const shape = (content) => JSON.stringify(content.sections.map((one) => [one.title, one.blocks.map((block) => block.name)]));
  const sizes = new ResizeObserver((found) => {
    for (const { target } of found) cards.find((card) => card.box === target)?.resize?.();
  });

  function head() {
    document.title = data.title;
    byId("title").textContent = data.title;
    byId("written").textContent = `written ${data.written}, version ${data.version}${data.live_seconds ? ", live" : ""}`;
  }

  function buildAll() {
    sizes.disconnect();
    for (const card of cards) card.plot?.destroy();
    cards = [];
    const made = data.sections.map((section) => {
      const own = section.blocks.map(cardOf);
      cards.push(...own);
      const id = slug(section.title), title = make("h2", { id: `title-of-${id}`, textContent: section.title });
      return make("section", { id, "aria-labelledby": `title-of-${id}` }, title, make("div", { className: "cards" }, ...own.map((card) => card.body)));
    });
    byId("main").replaceChildren(...made);
    byId("sections").replaceChildren(...data.sections.map((section) => make("a", { href: `#${slug(section.title)}`, textContent: section.title })));
    for (const card of cards) { card.build(); if (card.box) sizes.observe(card.box); }
    head();
  }

  function renew(next) {
    const same = shape(next) === shape(data), blocks = next.sections.flatMap((section) => section.blocks);
    data = { ...next, live_seconds: data.live_seconds };
    if (!same || !cards.every((card, number) => card.update(blocks[number]))) buildAll();
    head();
    byId("news").textContent = `new data, ${data.written}`;
  }

  const address = () => (zooms.step ? `data.json?from=${zooms.step[0]}&to=${zooms.step[1]}` : "data.json");

  async function ask() {
    const asked = address();
    try {
      const answer = await fetch(asked, { cache: "no-cache" });
      if (answer.ok) {
        const next = await answer.json();
        if (asked === address() && (asked !== shown || next.written !== data.written)) { shown = asked; renew(next); }
      }
    } catch { byId("written").textContent = `written ${data.written}; the server does not answer`; }
    askIn(asked === address() ? data.live_seconds : 0.3);
  }

  function askIn(seconds) {
    clearTimeout(timer);
    timer = setTimeout(ask, 1000 * seconds);
  }

  function applyTheme() {
    document.documentElement.dataset.theme = theme === "dark" || (theme === "automatic" && dark.matches) ? "dark" : "light";
    byId("theme").textContent = `theme: ${theme}`;
    for (const card of cards) card.build();
  }

  data = JSON.parse(byId("content").textContent);
  try { theme = THEMES.find((one) => one === localStorage.getItem("bigmodel-theme")) || theme; } catch { /* no storage */ }
  byId("theme").addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    try { localStorage.setItem("bigmodel-theme", theme); } catch { /* no storage */ }
    applyTheme();
  });
  byId("reset").addEventListener("click", resetZoom);
  dark.addEventListener("change", applyTheme);
  applyTheme();
  buildAll();
  if (data.live_seconds) askIn(data.live_seconds);
})();
