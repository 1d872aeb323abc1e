// A graph folded by module: which modules are open, and what is then seen as one box.
class Model {
  constructor(data) {
    this.nodes = data.nodes.map(([name, op, module, shape, weight, inputs, block], index) => ({
      index, name, op, module: data.modules[module], shape, weight, inputs, block,
    }));
    this.prefixes = new Map(data.modules.map((path) => [path, prefixesOf(path)]));
    this.sizes = new Map();
    for (const node of this.nodes) {
      for (const prefix of this.prefixes.get(node.module)) this.sizes.set(prefix, (this.sizes.get(prefix) || 0) + 1);
    }
  }

  // What stands for a node: the outermost closed module around it, or the node.
  standIn(node, open) {
    for (const prefix of this.prefixes.get(node.module)) {
      if (!open.has(prefix) && this.sizes.get(prefix) > 1) return `m:${prefix}`;
    }
    return `n:${node.index}`;
  }

  fold(open) {
    const items = [], places = new Map(), edges = new Map();
    for (const node of this.nodes) {
      const key = this.standIn(node, open);
      if (!places.has(key)) {
        places.set(key, items.length);
        items.push({ key, members: [], blocks: new Set(), path: key[0] === "m" ? key.slice(2) : null });
      }
      const place = places.get(key), item = items[place];
      item.members.push(node);
      if (node.block >= 0) item.blocks.add(node.block);
      for (const source of node.inputs) {
        const from = places.get(this.standIn(this.nodes[source], open));
        if (from !== place) edges.set(`${from} ${place}`, { from, to: place });
      }
    }
    for (const item of items) item.node = item.path === null ? item.members[0] : null;
    return { items, places, edges: [...edges.values()] };
  }

  visible(open) {
    return new Set(this.nodes.map((node) => this.standIn(node, open))).size;
  }

  openTo(depth) {
    return new Set([...this.sizes.keys()].filter((prefix) => prefix.split(".").length <= depth));
  }

  deepest() {
    return Math.max(0, ...[...this.sizes.keys()].map((prefix) => prefix.split(".").length));
  }
}

function prefixesOf(path) {
  const parts = path ? path.split(".") : [];
  return parts.map((_, index) => parts.slice(0, index + 1).join("."));
}
