// Where the services of a dependency graph stand, and how its edges run. Pure.
//
// A layered drawing, callers left of what they call: edges that close a cycle are turned
// round, each service gets a layer, edges that cross layers get a bend in each, the
// order within the layers is improved by barycentres, and each is moved towards its
// neighbours without overlap. At a service, every edge has a place of its own, and the
// service is as high as that takes. The same edges give the same drawing, in whatever order.

export const NODE_WIDTH = 164;
const NODE_HEIGHT = 48;
const MAX_NODE_HEIGHT = 240;
const LAYER_GAP = 156;
const NODE_GAP = 24;
const BEND_HEIGHT = 14;
const PORT_GAP = 17; // between edges at a node's side: a line of text, and some air
const MARGIN = 24;

const ORDER_SWEEPS = 12;
const PLACE_SWEEPS = 8;

// With more, edges run straight: bends are for graphs that one can still look at.
const MAX_BENDS = 5000;

/**
 * Return {nodes, edges, width, height} for edges that have `parent` and `child`.
 * nodes: [{name, x, y, height}], the left upper corner; edges: [{edge, points: [[x, y], ...],
 * back, room}], from the caller's side to the called's; `back` ones close a cycle; `room` is
 * the distance to the next that arrives. A service that calls itself has an edge whose
 * points go round its corner.
 */
export function layOut(edges) {
  const names = [...new Set(edges.flatMap(({ parent, child }) => [parent, child]))].sort();
  const nodes = names.map((name, number) => ({
    name,
    number,
    layer: 0,
    out: [],
    in: [],
    place: 0,
    y: 0,
  }));
  const byName = new Map(nodes.map((node) => [node.name, node]));

  const lines = edges
    .map((edge) => ({
      edge,
      from: byName.get(edge.parent),
      to: byName.get(edge.child),
      back: false,
    }))
    .sort((one, other) => one.from.number - other.from.number || one.to.number - other.to.number);
  const proper = lines.filter((line) => line.from !== line.to);
  for (const line of proper) line.from.out.push(line);
  turnBackEdges(nodes);
  assignLayers(nodes, proper);
  const layers = fillLayers(nodes, proper);
  setHeights(nodes, proper);
  orderLayers(layers);
  placeLayers(layers);

  const all = layers.flat();
  const top = all.reduce((least, spot) => Math.min(least, spot.y - heightOf(spot) / 2), Infinity);
  const bottom = all.reduce((most, spot) => Math.max(most, spot.y + heightOf(spot) / 2), -Infinity);
  for (const spot of all) spot.y += MARGIN - top;
  for (const node of nodes) placePorts(node);
  return {
    nodes: nodes.map((node) => ({
      name: node.name,
      x: leftOf(node),
      y: node.y - node.height / 2,
      height: node.height,
    })),
    edges: lines.map((line) => ({
      edge: line.edge,
      points: pointsOf(line),
      back: line.back,
      room: line.room ?? PORT_GAP,
    })),
    width: layers.length * (NODE_WIDTH + LAYER_GAP) - LAYER_GAP + 2 * MARGIN,
    height: all.length ? bottom - top + 2 * MARGIN : 2 * MARGIN,
  };
}

/** Return the edges at a service, and those between its neighbours. */
export function neighbourhood(edges, service) {
  const near = new Set([service]);
  for (const { parent, child } of edges) {
    if (parent === service) near.add(child);
    if (child === service) near.add(parent);
  }
  return edges.filter(({ parent, child }) => near.has(parent) && near.has(child));
}

/** Mark the edges that lead back to where a walk came from; sources are walked first. */
function turnBackEdges(nodes) {
  const called = new Set(nodes.flatMap((node) => node.out.map((line) => line.to)));
  const starts = [...nodes.filter((node) => !called.has(node)), ...nodes];
  const state = new Map(); // node -> "open" (being walked), "done"
  for (const start of starts) {
    if (state.has(start)) continue;
    const stack = [{ node: start, next: 0 }];
    state.set(start, "open");
    while (stack.length) {
      const step = stack.at(-1);
      const line = step.node.out[step.next++];
      if (!line) {
        state.set(step.node, "done");
        stack.pop();
      } else if (state.get(line.to) === "open") {
        line.back = true;
      } else if (!state.has(line.to)) {
        state.set(line.to, "open");
        stack.push({ node: line.to, next: 0 });
      }
    }
  }
}

/** The end of a line that stands further left, and the other. */
function leftEnd(line) {
  return line.back ? line.to : line.from;
}

function rightEnd(line) {
  return line.back ? line.from : line.to;
}

/** Give each node the layer after its last caller's; then sources move to what they call. */
function assignLayers(nodes, lines) {
  const after = new Map(nodes.map((node) => [node, []]));
  const waiting = new Map(nodes.map((node) => [node, 0]));
  for (const line of lines) {
    after.get(leftEnd(line)).push(rightEnd(line));
    waiting.set(rightEnd(line), waiting.get(rightEnd(line)) + 1);
  }
  const sources = nodes.filter((node) => !waiting.get(node));
  const queue = [...sources];
  for (const node of queue) {
    for (const next of after.get(node)) {
      next.layer = Math.max(next.layer, node.layer + 1);
      waiting.set(next, waiting.get(next) - 1);
      if (!waiting.get(next)) queue.push(next);
    }
  }
  for (const node of sources) {
    const nearest = after.get(node).reduce((least, next) => Math.min(least, next.layer), Infinity);
    if (nearest < Infinity) node.layer = nearest - 1;
  }
}

/** Return the layers with nodes and bends; `in` and `out` then hold direct neighbours. */
function fillLayers(nodes, lines) {
  const count = nodes.reduce((most, node) => Math.max(most, node.layer + 1), 0);
  const layers = Array.from({ length: count }, () => []);
  for (const node of nodes) {
    node.out = [];
    layers[node.layer].push(node);
  }
  const length = (line) => rightEnd(line).layer - leftEnd(line).layer;
  const bends = lines.reduce((total, line) => total + length(line) - 1, 0);
  for (const line of lines) {
    line.bends = [];
    const [left, right] = [leftEnd(line), rightEnd(line)];
    let last = left;
    for (let layer = left.layer + 1; layer < right.layer && bends <= MAX_BENDS; layer += 1) {
      const bend = { layer, out: [], in: [], place: 0, y: 0, bend: true };
      layers[layer].push(bend);
      line.bends.push(bend);
      connect(last, bend);
      last = bend;
    }
    if (right.layer === last.layer + 1) connect(last, right);
  }
  layers.forEach(number);
  return layers;
}

function connect(left, right) {
  left.out.push(right);
  right.in.push(left);
}

function number(layer) {
  layer.forEach((spot, place) => {
    spot.place = place;
  });
}

/** Sweep there and back, keep the order with the fewest crossings. */
function orderLayers(layers) {
  let best = layers.map((layer) => [...layer]);
  let fewest = crossings(layers);
  for (let sweep = 0; sweep < ORDER_SWEEPS && fewest; sweep += 1) {
    const forward = sweep % 2 === 0;
    for (const layer of forward ? layers : [...layers].reverse()) {
      const side = forward ? "in" : "out";
      const centre = new Map(layer.map((spot) => [spot, mean(spot[side], "place") ?? spot.place]));
      layer.sort((one, other) => centre.get(one) - centre.get(other) || one.place - other.place);
      number(layer);
    }
    const now = crossings(layers);
    if (now < fewest) {
      fewest = now;
      best = layers.map((layer) => [...layer]);
    }
  }
  best.forEach((layer, index) => {
    layers[index] = layer;
    number(layer);
  });
}

function mean(spots, field) {
  if (!spots.length) return null;
  return spots.reduce((total, spot) => total + spot[field], 0) / spots.length;
}

/** Count the pairs of edges between neighbouring layers that cross. */
function crossings(layers) {
  let total = 0;
  for (const layer of layers) {
    const ends = layer.flatMap((spot) =>
      spot.out.map((next) => next.place).sort((one, other) => one - other),
    );
    total += inversions(ends);
  }
  return total;
}

/** Count the pairs that are in the wrong order, by merging. */
function inversions(numbers) {
  if (numbers.length < 2) return 0;
  const middle = numbers.length >> 1;
  const left = numbers.slice(0, middle);
  const right = numbers.slice(middle);
  let total = inversions(left) + inversions(right);
  let taken = 0;
  for (let index = 0, other = 0; index < numbers.length; index += 1) {
    if (other >= right.length || (taken < left.length && left[taken] <= right[other])) {
      numbers[index] = left[taken++];
    } else {
      numbers[index] = right[other++];
      total += left.length - taken;
    }
  }
  return total;
}

/** Move every layer's spots towards their neighbours', alternately left and right ones. */
function placeLayers(layers) {
  for (const layer of layers) settle(layer, () => 0);
  for (let sweep = 0; sweep < PLACE_SWEEPS; sweep += 1) {
    const forward = sweep % 2 === 0;
    const side = forward ? "in" : "out";
    for (const layer of forward ? layers : [...layers].reverse()) {
      settle(layer, (spot) => mean(spot[side], "y") ?? spot.y);
    }
  }
}

// Put each spot as near to where it wants to be as order and distance allow: the least
// squares, by pooling neighbours that want to stand closer than they may.
function settle(layer, wish) {
  const pools = [];
  let offset = 0;
  layer.forEach((spot, index) => {
    if (index) offset += (heightOf(layer[index - 1]) + heightOf(spot)) / 2 + NODE_GAP;
    let pool = { sum: wish(spot) - offset, spots: [spot], offsets: [offset] };
    while (pools.length && middle(pools.at(-1)) > middle(pool)) {
      const before = pools.pop();
      pool = {
        sum: before.sum + pool.sum,
        spots: before.spots.concat(pool.spots),
        offsets: before.offsets.concat(pool.offsets),
      };
    }
    pools.push(pool);
  });
  for (const pool of pools) {
    pool.spots.forEach((spot, index) => {
      spot.y = middle(pool) + pool.offsets[index];
    });
  }
}

function middle(pool) {
  return pool.sum / pool.spots.length;
}

function heightOf(spot) {
  return spot.bend ? BEND_HEIGHT : spot.height;
}

/** Collect the lines at each side of a node; it is as high as they need. */
function setHeights(nodes, lines) {
  for (const node of nodes) {
    node.atLeft = [];
    node.atRight = [];
  }
  for (const line of lines) {
    leftEnd(line).atRight.push(line);
    rightEnd(line).atLeft.push(line);
  }
  for (const node of nodes) {
    const ports = Math.max(node.atLeft.length, node.atRight.length);
    node.height = Math.min(MAX_NODE_HEIGHT, Math.max(NODE_HEIGHT, ports * PORT_GAP + 12));
  }
}

/** Give the lines at a node their places, in the order of where they come from. */
function placePorts(node) {
  const sides = [
    [node.atLeft, "rightY", (line) => line.bends.at(-1) ?? leftEnd(line), (line) => !line.back],
    [node.atRight, "leftY", (line) => line.bends[0] ?? rightEnd(line), (line) => line.back],
  ];
  for (const [lines, field, next, arrives] of sides) {
    lines.sort((one, other) => next(one).y - next(other).y);
    const gap = Math.min(PORT_GAP, (node.height - 12) / lines.length);
    lines.forEach((line, index) => {
      line[field] = node.y + (index - (lines.length - 1) / 2) * gap;
      if (arrives(line)) line.room = gap;
    });
  }
}

function leftOf(spot) {
  return MARGIN + spot.layer * (NODE_WIDTH + LAYER_GAP);
}

/** Return where a line runs, from its caller to what it calls. */
function pointsOf(line) {
  if (line.from === line.to) return loopAround(line.from);
  const [left, right] = [leftEnd(line), rightEnd(line)];
  const points = [[leftOf(left) + NODE_WIDTH, line.leftY]];
  for (const bend of line.bends) {
    points.push([leftOf(bend), bend.y], [leftOf(bend) + NODE_WIDTH, bend.y]);
  }
  points.push([leftOf(right), line.rightY]);
  return line.back ? points.reverse() : points;
}

function loopAround(node) {
  const [x, top] = [leftOf(node) + NODE_WIDTH, node.y - node.height / 2];
  return [
    [x - 36, top],
    [x - 36, top - 16],
    [x - 12, top - 16],
    [x - 12, top],
  ];
}
