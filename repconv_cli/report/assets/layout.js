// Where the boxes of a graph go: rows by longest path from the inputs, columns ("lanes") so that a chain stays straight
// and a long edge keeps a lane of its own. Linear in nodes and edge lengths: thousands of boxes take milliseconds.
const BOX = { width: 168, height: 38, gapX: 26, gapY: 30 };

function layOut(count, edges) {
  const into = Array.from({ length: count }, () => []), outOf = Array.from({ length: count }, () => []);
  for (const edge of edges) if (edge.from < edge.to) { into[edge.to].push(edge); outOf[edge.from].push(edge); }
  const rank = new Array(count).fill(0);
  for (let v = 0; v < count; v++) for (const edge of into[v]) rank[v] = Math.max(rank[v], rank[edge.from] + 1);
  // An input of the model stands just above the first that reads it.
  for (let v = 0; v < count; v++) {
    if (!into[v].length && outOf[v].length) rank[v] = Math.max(0, Math.min(...outOf[v].map((e) => rank[e.to])) - 1);
  }
  const rows = [];
  for (let v = 0; v < count; v++) (rows[rank[v]] ||= []).push(v);
  const taken = rows.map(() => new Set()), lane = new Array(count).fill(0);
  const isFree = (column, from, to) => {
    for (let row = from; row <= to; row++) if (taken[row].has(column)) return false;
    return true;
  };
  const nearest = (wish, from, to, skip) => {
    for (let step = 0; ; step++) {
      for (const column of step ? [wish + step, wish - step] : [wish]) {
        if (column !== skip && isFree(column, from, to)) return column;
      }
    }
  };
  rows.forEach((row, r) => {
    // Where branches meet, the lane nearest to the middle goes on: the trunk of a model stays straight.
    const wish = (v) => into[v].map((edge) => edge.lane ?? lane[edge.from])
      .reduce((best, column) => (best === null || Math.abs(column) < Math.abs(best) ? column : best), null) ?? 0;
    for (const v of row) taken[r].add((lane[v] = nearest(wish(v), r, r)));
    for (const v of row) {
      const goesOn = outOf[v].some((edge) => rank[edge.to] === r + 1);
      for (const edge of outOf[v]) {
        const end = rank[edge.to] - 1;
        if (end <= r) continue;
        edge.lane = nearest(lane[v], r + 1, end, goesOn ? lane[v] : null);
        for (let between = r + 1; between <= end; between++) taken[between].add(edge.lane);
      }
    }
  });
  const pitchX = BOX.width + BOX.gapX, pitchY = BOX.height + BOX.gapY;
  return {
    x: lane.map((column) => column * pitchX), y: rank.map((row) => row * pitchY),
    paths: edges.map((edge) => edgePath(edge, lane, rank, pitchX, pitchY)),
  };
}

function edgePath(edge, lane, rank, pitchX, pitchY) {
  const x1 = lane[edge.from] * pitchX + BOX.width / 2, y1 = rank[edge.from] * pitchY + BOX.height;
  const x2 = lane[edge.to] * pitchX + BOX.width / 2, y2 = rank[edge.to] * pitchY;
  const bend = BOX.gapY * 0.8;
  const curve = (ax, ay, bx, by) => `C${ax} ${ay + bend} ${bx} ${by - bend} ${bx} ${by}`;
  let d = `M${x1} ${y1}`;
  let left = Math.min(x1, x2), right = Math.max(x1, x2);
  if (edge.lane === undefined) d += curve(x1, y1, x2, y2);
  else {
    const x = edge.lane * pitchX + BOX.width / 2, top = y1 + BOX.gapY, bottom = y2 - BOX.gapY;
    d += curve(x1, y1, x, top) + `V${bottom}` + curve(x, bottom, x2, y2);
    left = Math.min(left, x); right = Math.max(right, x);
  }
  const head = `M${x2} ${y2}l-4 -7h8z`;
  return { d, head, left, right, top: Math.min(y1, y2), bottom: Math.max(y1, y2) };
}
