// One graph as SVG: pan, zoom, keyboard. Only what is in view is in the page; from afar, boxes are one path.
const SVG = "http://www.w3.org/2000/svg", FAR = 0.34, HUES = 6;

function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

class Pane {
  constructor(host, model, app) {
    Object.assign(this, { host, model, app, shown: new Map(), current: null, scale: 1, dx: 0, dy: 0 });
    this.lines = svg("path", { class: "lines" });
    this.heads = svg("path", { class: "heads" });
    this.far = svg("g");
    this.near = svg("g");
    this.world = svg("g", {}, this.lines, this.heads, this.far, this.near);
    this.root = svg("svg", {
      tabindex: 0, role: "application", "aria-roledescription": "graph", "aria-label": host.dataset.label,
    }, this.world);
    host.append(this.root);
    this.listen();
  }

  refold(open) {
    this.open = open;
    Object.assign(this, this.model.fold(open));
    this.layout = layOut(this.items.length, this.edges);
    const { x, y } = this.layout;
    this.bounds = {
      left: Math.min(...x), top: 0, right: Math.max(...x) + BOX.width, bottom: Math.max(...y) + BOX.height,
    };
    for (const element of this.shown.values()) element.remove();
    this.shown.clear();
    if (this.current && !this.places.has(this.current)) this.current = null;
    this.draw();
  }

  fit(whole) {
    const { width, height } = this.root.getBoundingClientRect(), b = this.bounds;
    const byWidth = (width - 24) / (b.right - b.left), byHeight = (height - 24) / (b.bottom - b.top);
    // At first the top is shown large enough to read; "fit" shows all of it, or of a very long chain as much as can still be seen.
    this.scale = Math.min(1, whole ? Math.max(Math.min(byWidth, byHeight), 0.05) : Math.max(Math.min(byWidth, 1), 0.6));
    this.dx = width / 2 - this.scale * (whole ? (b.left + b.right) / 2 : BOX.width / 2);
    this.dy = 12;
    this.draw();
  }

  zoom(factor, cx, cy) {
    const { width, height } = this.root.getBoundingClientRect();
    const [x, y] = [cx ?? width / 2, cy ?? height / 2];
    const scale = Math.min(3, Math.max(0.02, this.scale * factor)), ratio = scale / this.scale;
    Object.assign(this, { scale, dx: x - (x - this.dx) * ratio, dy: y - (y - this.dy) * ratio });
    this.draw();
  }

  centre(key) {
    const place = this.places.get(key);
    if (place === undefined) return;
    const { width, height } = this.root.getBoundingClientRect();
    this.scale = Math.max(this.scale, 0.7);
    this.dx = width / 2 - this.scale * (this.layout.x[place] + BOX.width / 2);
    this.dy = height / 2 - this.scale * (this.layout.y[place] + BOX.height / 2);
    this.draw();
  }

  draw() {
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => { this.waiting = 0; this.drawNow(); });
  }

  drawNow() {
    const { width, height } = this.root.getBoundingClientRect(), margin = 60;
    const view = {
      left: (-this.dx - margin) / this.scale, right: (width - this.dx + margin) / this.scale,
      top: (-this.dy - margin) / this.scale, bottom: (height - this.dy + margin) / this.scale,
    };
    this.world.setAttribute("transform", `translate(${this.dx} ${this.dy}) scale(${this.scale})`);
    const seen = this.layout.paths.filter(
      (p) => p.right >= view.left && p.left <= view.right && p.bottom >= view.top && p.top <= view.bottom);
    this.lines.setAttribute("d", seen.map((p) => p.d).join(""));
    const isFar = this.scale < FAR;
    this.heads.setAttribute("d", isFar ? "" : seen.map((p) => p.head).join(""));
    const { x, y } = this.layout, inView = [];
    for (let place = 0; place < this.items.length; place++) {
      const isIn = x[place] <= view.right && x[place] + BOX.width >= view.left &&
        y[place] <= view.bottom && y[place] + BOX.height >= view.top;
      if (isIn) inView.push(place);
    }
    this.drawFar(isFar ? inView : []);
    this.drawNear(isFar ? [] : inView);
  }

  drawFar(places) {
    const paths = new Map();
    for (const place of places) {
      const look = this.lookOf(this.items[place]);
      const { [place]: x } = this.layout.x, { [place]: y } = this.layout.y;
      paths.set(look, (paths.get(look) || "") + `M${x} ${y}h${BOX.width}v${BOX.height}h-${BOX.width}z`);
    }
    this.far.replaceChildren(...[...paths].map(([look, d]) => svg("path", { class: `box ${look}`, d })));
  }

  drawNear(places) {
    const wanted = new Set(places.map((place) => this.items[place].key));
    for (const [key, element] of this.shown) if (!wanted.has(key)) { element.remove(); this.shown.delete(key); }
    for (const place of places) {
      const item = this.items[place];
      let element = this.shown.get(item.key);
      if (!element) {
        element = this.boxFor(item, place);
        this.shown.set(item.key, element);
        this.near.append(element);
      }
      element.classList.toggle("current", item.key === this.current);
      element.classList.toggle("chosen", this.app.block !== null && item.blocks.has(this.app.block));
    }
  }

  lookOf(item) {
    const [block] = item.blocks;
    return (block === undefined ? "plain" : `hue${block % HUES}`) + (item.path === null ? "" : " module");
  }

  boxFor(item, place) {
    const { [place]: x } = this.layout.x, { [place]: y } = this.layout.y, { title, below } = wordsFor(item, this.app);
    const box = svg("g", { class: `node ${this.lookOf(item)}`, transform: `translate(${x} ${y})`, "data-key": item.key },
      svg("title", {}, `${title}\n${below}`),
      svg("rect", { class: `box ${this.lookOf(item)}`, width: BOX.width, height: BOX.height, rx: 6 }),
      svg("text", { x: 10, y: 16, class: "title" }, cut(title, 22)),
      svg("text", { x: 10, y: 30, class: "below" }, cut(below, 25, true)));
    if (item.blocks.size) box.append(svg("rect", { class: "mark", width: 5, height: BOX.height, rx: 2 }));
    return box;
  }

  choose(key, activate) {
    this.current = key;
    const item = this.items[this.places.get(key)];
    this.app.tell(this, item);
    if (activate) this.app.activate(this, item);
    this.draw();
  }

  listen() {
    const { root } = this;
    let drag = null;
    root.addEventListener("wheel", (event) => {
      event.preventDefault();
      const { left, top } = root.getBoundingClientRect();
      this.zoom(Math.exp(-event.deltaY * 0.0015), event.clientX - left, event.clientY - top);
    }, { passive: false });
    root.addEventListener("pointerdown", (event) => {
      drag = { x: event.clientX - this.dx, y: event.clientY - this.dy, moved: false, from: event.target.closest(".node") };
      root.setPointerCapture(event.pointerId);
    });
    root.addEventListener("pointermove", (event) => {
      if (!drag) return;
      const [dx, dy] = [event.clientX - drag.x, event.clientY - drag.y];
      drag.moved ||= Math.abs(dx - this.dx) + Math.abs(dy - this.dy) > 4;
      if (drag.moved) { Object.assign(this, { dx, dy }); this.draw(); }
    });
    root.addEventListener("pointerup", () => {
      const { moved, from } = drag || {};
      drag = null;
      if (!moved && from) this.choose(from.dataset.key, true);
    });
    root.addEventListener("pointercancel", () => { drag = null; });
    root.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.items && this.draw()).observe(root);
  }

  key(event) {
    const actions = {
      ArrowDown: () => this.step("to"), ArrowUp: () => this.step("from"),
      ArrowRight: () => this.along(1), ArrowLeft: () => this.along(-1),
      Enter: () => this.current && this.choose(this.current, true), " ": () => this.current && this.choose(this.current, true),
      "+": () => this.zoom(1.25), "=": () => this.zoom(1.25), "-": () => this.zoom(0.8), 0: () => this.fit(true),
      Backspace: () => this.current && this.app.closeAround(this, this.items[this.places.get(this.current)]),
    };
    if (!actions[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    actions[event.key]();
  }

  step(end) {
    const here = this.places.get(this.current), other = end === "to" ? "from" : "to";
    const edge = this.edges.find((one) => one[other] === here);
    this.go(edge ? edge[end] : here ?? 0);
  }

  along(by) {
    const here = this.places.get(this.current) ?? -by;
    this.go(Math.min(this.items.length - 1, Math.max(0, here + by)));
  }

  go(place) {
    this.choose(this.items[place].key, false);
    this.centre(this.items[place].key);
  }
}

function cut(text, most, keepEnd) {
  if (text.length <= most) return text;
  return keepEnd ? `…${text.slice(text.length - most + 1)}` : `${text.slice(0, most - 1)}…`;
}

function wordsFor(item, app) {
  if (item.path !== null) {
    const parts = item.blocks.size ? `${item.blocks.size} block${item.blocks.size > 1 ? "s" : ""}, ` : "";
    return { title: `▸ ${item.path}`, below: `${parts}${item.members.length} operations` };
  }
  const { node } = item, kernel = node.weight ? ` ${node.weight}` : "";
  const where = node.block >= 0 ? app.data.blocks[node.block].name : node.module || node.name;
  return { title: `${node.op}${kernel}`, below: where };
}
