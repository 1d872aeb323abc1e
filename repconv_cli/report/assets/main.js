// The page: two panes over one fold, search, and the dialog of a block. Text from the file is only ever text.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const MOST_BOXES = 240, MOST_FOUND = 40;

const app = {
  data, block: null, open: new Set(), panes: [],

  refold() {
    for (const pane of this.panes) pane.refold(this.open);
    byId("depth").textContent = `${this.panes.map((pane) => pane.items.length.toLocaleString("en-US")).join(" and ")} boxes`;
  },

  activate(pane, item) {
    if (item.path !== null) {
      this.open = new Set([...this.open, item.path]);
      this.refold();
      const first = item.members[0];
      pane.choose(pane.model.standIn(first, this.open), false);
      pane.centre(pane.current);
    } else if (item.node.block >= 0) this.showBlock(item.node.block);
  },

  closeAround(pane, item) {
    const path = item.path ? item.path.split(".").slice(0, -1).join(".") : item.node.module;
    const around = prefixesOf(path).filter((one) => this.open.has(one) && pane.model.sizes.get(one) > 1).pop();
    if (!around) return;
    this.open = new Set([...this.open].filter((one) => one !== around && !one.startsWith(`${around}.`)));
    this.refold();
    const key = `m:${around}`;
    if (pane.places.has(key)) { pane.choose(key, false); pane.centre(key); }
  },

  tell(pane, item) {
    const words = item.path !== null
      ? `module ${item.path}: ${item.members.length} operations. Enter opens it.`
      : `${item.node.op} ${item.node.name}, ${item.node.module || "top level"}` +
        (item.node.shape ? `, output ${item.node.shape}` : "") +
        (item.node.block >= 0 ? `, in block ${data.blocks[item.node.block].name}. Enter shows the block.` : ".");
    const close = h("button", { type: "button" }, "Fold its module");
    close.addEventListener("click", () => this.closeAround(pane, item));
    byId("told").replaceChildren(words, " ", close);
  },

  markBlock(index) {
    this.block = index;
    for (const pane of this.panes) {
      const node = pane.model.nodes.find((one) => one.block === index);
      if (node) this.reveal(pane, node);
    }
  },

  reveal(pane, node) {
    const closed = pane.model.prefixes.get(node.module).filter((prefix) => !this.open.has(prefix));
    if (closed.length) {
      this.open = new Set([...this.open, ...closed]);
      this.refold();
    }
    pane.current = pane.model.standIn(node, this.open);
    pane.centre(pane.current);
  },

  showBlock(index) {
    const block = data.blocks[index], dialog = byId("block");
    byId("block-title").textContent = `Block ${block.name}`;
    showBlock(byId("block-body"), block);
    byId("block-previous").disabled = index === 0;
    byId("block-next").disabled = index === data.blocks.length - 1;
    if (this.panes.length) this.markBlock(index);
    this.block = index;
    if (!dialog.open) dialog.showModal();
    byId("block-body").scrollTop = 0;
    history.replaceState(null, "", `#block-${index}`);
  },
};

function startPanes() {
  if (!data.graphs) return;
  for (const side of ["before", "after"]) {
    app.panes.push(new Pane(byId(`pane-${side}`), new Model(data.graphs[side]), app));
  }
  const models = app.panes.map((pane) => pane.model);
  const deepest = Math.max(...models.map((model) => model.deepest()));
  let depth = 0;
  while (depth < deepest && models.every((model) => model.visible(model.openTo(depth + 1)) <= MOST_BOXES)) depth += 1;
  const setDepth = (wanted) => {
    depth = Math.max(0, Math.min(deepest, wanted));
    app.open = new Set(models.flatMap((model) => [...model.openTo(depth)]));
    app.refold();
  };
  setDepth(depth);
  const all = (action) => () => app.panes.forEach(action);
  const buttons = {
    "more": () => setDepth(depth + 1), "fewer": () => setDepth(depth - 1),
    "zoom-in": all((pane) => pane.zoom(1.25)), "zoom-out": all((pane) => pane.zoom(0.8)),
    "fit": all((pane) => pane.fit(true)), "top": all((pane) => pane.fit(false)),
  };
  for (const [id, action] of Object.entries(buttons)) byId(id).addEventListener("click", action);
  app.panes.forEach((pane) => pane.fit(false));
}

function search(text) {
  const wanted = text.trim().toLowerCase();
  if (!wanted) return [];
  const found = [];
  data.blocks.forEach((block, index) => {
    if (`${block.name} ${block.kind}`.toLowerCase().includes(wanted)) {
      found.push({ label: `block ${block.name}`, go: () => app.showBlock(index) });
    }
  });
  for (const [side, pane] of app.panes.entries()) {
    for (const node of pane.model.nodes) {
      if (found.length > MOST_FOUND) break;
      if (`${node.name} ${node.op} ${node.module}`.toLowerCase().includes(wanted)) {
        const label = `${side ? "after" : "before"}: ${node.op} ${node.name}, ${node.module || "top level"}`;
        found.push({ label, go: () => {
          app.reveal(pane, node);
          app.tell(pane, pane.items[pane.places.get(pane.current)]);
          pane.root.focus();
        } });
      }
    }
  }
  return found;
}

function startSearch() {
  const input = byId("search"), list = byId("found");
  const show = () => {
    const found = search(input.value);
    byId("found-count").textContent = input.value ? `${found.length > MOST_FOUND ? `over ${MOST_FOUND}` : found.length} found` : "";
    list.replaceChildren(...found.slice(0, MOST_FOUND).map((one) => {
      const button = h("button", { type: "button" }, one.label);
      button.addEventListener("click", one.go);
      return h("li", {}, button);
    }));
    list.hidden = !found.length;
  };
  let waiting = 0;
  input.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(show, 60); });
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter") { clearTimeout(waiting); show(); list.querySelector("button")?.click(); }
    if (event.key === "ArrowDown") { event.preventDefault(); list.querySelector("button")?.focus(); }
    if (event.key === "Escape") { input.value = ""; show(); }
  });
  list.addEventListener("keydown", (event) => {
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const buttons = [...list.querySelectorAll("button")], next = buttons.indexOf(document.activeElement) + by;
    (next < 0 ? input : buttons[Math.min(next, buttons.length - 1)]).focus();
  });
}

function startBlocks() {
  const dialog = byId("block");
  document.addEventListener("click", (event) => {
    const opener = event.target.closest("[data-block]");
    if (opener) app.showBlock(Number(opener.dataset.block));
  });
  byId("block-previous").addEventListener("click", () => app.showBlock(app.block - 1));
  byId("block-next").addEventListener("click", () => app.showBlock(app.block + 1));
  dialog.addEventListener("close", () => history.replaceState(null, "", "#blocks"));
  const linked = /^#block-(\d+)$/.exec(location.hash);
  if (linked && data.blocks[linked[1]]) app.showBlock(Number(linked[1]));
}

startPanes();
startSearch();
startBlocks();
document.documentElement.dataset.ready = "yes";
