// What a click on a block opens: its branches as a drawing, its kernels as heat maps that add up, its weights' ranges.
function h(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function showBlock(host, block) {
  host.replaceChildren(
    h("p", { class: "lead" }, `${block.kind}  →  one operator, weight ${block.shape || "none"}`),
    h("h3", {}, "Branches"), branchDrawing(block),
    h("h3", {}, "Kernels"), ...kernelPictures(block),
    h("h3", {}, "Range of the weights"), ...ranges(block),
    h("h3", {}, "Figures"), figures(block));
}

// Two pictures side by side, or one below the other where there is no room: text stays as large as the page's.
function branchDrawing(block) {
  return h("div", { class: "equation branches" }, branchesBefore(block), h("span", { class: "sign" }, "becomes"), oneOperator(block));
}

function board(width, height, label) {
  const picture = svg("svg", { viewBox: `-2 0 ${width + 4} ${height}`, width: width + 4, role: "img", "aria-label": label });
  const box = (x, y, size, text, look) => picture.append(
    svg("rect", { x, y: y - 15, width: size, height: 30, rx: 6, class: `part ${look}` }),
    svg("text", { x: x + size / 2, y: y + 5, "text-anchor": "middle" }, cut(text, Math.floor(size / 7.5))));
  const arrow = (x1, y1, x2, y2) => picture.append(
    svg("path", { class: "wire", d: `M${x1} ${y1}C${(x1 + x2) / 2} ${y1} ${(x1 + x2) / 2} ${y2} ${x2} ${y2}` }),
    svg("path", { class: "tip", d: `M${x2} ${y2}l-7 -4v8z` }));
  return { picture, box, arrow };
}

function branchesBefore(block) {
  const chains = block.branches.map((branch) => branch.split("→"));
  const step = 44, widest = Math.max(...chains.map((chain) => chain.length)), start = 96;
  const cell = Math.min(190, Math.max(96, ...chains.flat().map((text) => 9 * text.length + 20)));
  const height = Math.max(2, chains.length) * step + 12, middle = height / 2, sum = start + widest * (cell + 26) + 8;
  const { picture, box, arrow } = board(sum + 26, height, `Before: ${block.branches.join(", ")}, all read one input and are added.`);
  box(0, middle, 64, "input", "end");
  chains.forEach((chain, row) => {
    const y = middle + (row - (chains.length - 1) / 2) * step;
    let x = start;
    arrow(64, middle, x, y);
    chain.forEach((text, index) => {
      if (index) arrow(x - 26, y, x, y);
      box(x, y, cell, text, `hue${row % HUES}`);
      x += cell + 26;
    });
    arrow(x - 26, y, sum, middle);
  });
  picture.append(svg("circle", { cx: sum + 13, cy: middle, r: 13, class: "part end" }),
    svg("text", { x: sum + 13, y: middle + 6, "text-anchor": "middle", class: "plus" }, chains.length > 1 ? "+" : "="));
  return picture;
}

function oneOperator(block) {
  const { picture, box, arrow } = board(292, 44, `After: one operator, weight ${block.shape || "none"}.`);
  box(0, 22, 64, "input", "end");
  arrow(64, 22, 92, 22);
  box(92, 22, 200, `one operator ${block.shape}`, "sum");
  return picture;
}

function kernelPictures(block) {
  const { picture } = block;
  if (!picture || !picture.fused) return [h("p", {}, (picture && picture.note) || "No kernel was computed.")];
  const [rows, columns] = picture.taps;
  const found = [h("p", { class: "hint" },
    "Each row adds up: every branch is written on the taps of the fused kernel, zeros elsewhere, then all are added.")];
  picture.pairs.forEach(([output, input], pair) => {
    const values = [...picture.branches, picture.fused].map((kernel) => kernel.slices[pair]);
    found.push(equation(`output channel ${output} from input channel ${input}`, picture, values, rows, columns, true));
  });
  const overall = [...picture.branches, picture.fused].map((kernel) => kernel.rms);
  found.push(equation("all channels: root mean square of each tap (these do not add up)",
    picture, overall, rows, columns, false));
  return found;
}

function equation(title, picture, values, rows, columns, adds) {
  const largest = Math.max(1e-30, ...values.flat().map(Math.abs));
  const row = h("div", { class: "equation" });
  values.forEach((taps, index) => {
    const isSum = index === values.length - 1, kernel = isSum ? picture.fused : picture.branches[index];
    if (index && adds) row.append(h("span", { class: "sign", "aria-hidden": "true" }, isSum ? "=" : "+"));
    const extent = kernel.extent.join("×") || "1";
    const embedded = extent === `${rows}×${columns}` || rows * columns === 1 ? "" : ", embedded";
    const caption = isSum ? "one kernel" : kernel.label + embedded;
    row.append(h("figure", {}, heatMap(taps, rows, columns, largest, `${caption}, ${title}`), h("figcaption", {}, caption)));
  });
  return h("section", { class: "sums" }, h("h4", {}, title), row);
}

function heatMap(taps, rows, columns, largest, label) {
  const cell = Math.max(5, Math.min(44, Math.floor(210 / Math.max(rows, columns)))), hasText = cell >= 30;
  const words = taps.length <= 49 ? `: ${taps.map(short).join(", ")}` : "";
  const map = svg("svg", {
    class: "heat", width: columns * cell + 2, height: rows * cell + 2, role: "img", "aria-label": `${label}${words}`,
  });
  taps.forEach((value, index) => {
    const x = (index % columns) * cell + 1, y = Math.floor(index / columns) * cell + 1, share = Math.abs(value) / largest;
    const [low, high] = value < 0 ? ["#f4f6fb", "#1f4e9c"] : ["#fbf5f1", "#a8341b"];
    map.append(svg("rect", { x, y, width: cell, height: cell, fill: mix(low, high, Math.sqrt(share)), class: "tap" }));
    if (hasText) {
      map.append(svg("text", {
        x: x + cell / 2, y: y + cell / 2 + 4, "text-anchor": "middle",
        class: `value ${Math.sqrt(share) > 0.72 ? "on-dark" : "on-light"}`,
      }, short(value)));
    }
  });
  return map;
}

function mix(low, high, share) {
  const part = (text, place) => parseInt(text.slice(1 + 2 * place, 3 + 2 * place), 16);
  return `rgb(${[0, 1, 2].map((i) => Math.round(part(low, i) + (part(high, i) - part(low, i)) * share)).join(",")})`;
}

function short(value) {
  if (value === null) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1000 || size < 0.001 ? value.toExponential(0) : value.toFixed(size >= 10 ? 1 : size >= 1 ? 2 : 3);
}

function ranges(block) {
  const { picture } = block, all = [...(picture ? picture.before : []), ...(picture && picture.after ? [picture.after] : [])];
  if (!all.length) return [h("p", {}, "No weight to show.")];
  const reach = Math.max(...all.map((one) => Math.max(-one.low, one.high))), width = 260;
  const body = h("tbody", {}, ...all.map((one) => {
    const x = (value) => width / 2 + (value / reach) * (width / 2 - 4);
    const bar = svg("svg", { width, height: 16, role: "img", "aria-label": `from ${short(one.low)} to ${short(one.high)}` },
      svg("line", { x1: width / 2, x2: width / 2, y1: 0, y2: 16, class: "axis" }),
      svg("rect", { x: x(one.low), y: 5, width: Math.max(1, x(one.high) - x(one.low)), height: 6, class: "reach" }),
      svg("rect", { x: x(-one.rms), y: 3, width: Math.max(1, x(one.rms) - x(-one.rms)), height: 10, class: "bulk" }));
    const name = one === picture.after ? `after: ${one.name}` : one.name;
    return h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, bar),
      h("td", { class: "number" }, `${short(one.low)} … ${short(one.high)}`),
      h("td", { class: "number" }, `${(100 * one.error).toFixed(1)} %`),
      h("td", { class: "number" }, `${(100 * one.byChannel).toFixed(1)} %`));
  }));
  const head = h("thead", {}, h("tr", {}, ...["weight", "smallest to largest; thick: ± rms", "range", "int8 error, one scale",
    "one scale a channel"].map((text) => h("th", { scope: "col" }, text))));
  const found = [h("div", { class: "wide" }, h("table", {}, head, body))];
  if (block.warning) found.unshift(h("p", { class: "warning" }, `⚠ ${block.warning}`));
  return found;
}

function figures(block) {
  const rows = [
    ["operations", ...block.ops], ["parameters", ...block.params], ["MACs of one sample", ...block.macs],
  ].map(([name, before, after]) => [name, `${count(before)} → ${count(after)}`]);
  if (block.error !== null) rows.push(["proof", `error ${block.error.toExponential(1)} of its scale, limit ${block.limit.toExponential(0)}`]);
  rows.push(["read from", block.sources.join(", ")], ["written to", block.target || "no tensor"]);
  return h("dl", {}, ...rows.flatMap(([name, text]) => [h("dt", {}, name), h("dd", {}, text)]));
}

function count(value) {
  return value === null ? "–" : value.toLocaleString("en-US");
}
