// The critical path: what the root's duration was spent on. Pure.
//
// Backwards from the root's end: the child that finished last before now is what the
// parent waited for; between children, the parent itself worked. What ran beside such a
// child did not delay anything. A child that outlasts its parent counts until its end.
//
// The segments follow each other without gap or overlap and add up to the root's
// duration, in the clock of the root. Where the server's clock differs, its half and what
// it called are moved for this: `shiftUs` of a segment is what to subtract to find it on
// the server's own clock.

/** Return [{node, startUs, endUs, shiftUs}], the earliest first. */
export function criticalPath(trace) {
  const segments = [];
  const root = trace.root.first;
  const stack = [frameOf(root, root.startUs, root.endUs, 0)];
  while (stack.length) {
    const frame = stack.at(-1);
    const awaited = nextAwaited(frame);
    const untilUs = awaited ? awaited.endUs : frame.startUs;
    if (untilUs < frame.nowUs) {
      const { node, nowUs, shiftUs } = frame;
      segments.push({ node, startUs: untilUs, endUs: nowUs, shiftUs });
    }
    if (awaited) {
      frame.nowUs = awaited.startUs;
      stack.push(awaited);
    } else {
      stack.pop();
    }
  }
  return segments.reverse();
}

/** Return how long each row was on the path, in microseconds. */
export function timeOnPath(segments) {
  const times = new Map();
  for (const { node, startUs, endUs } of segments) {
    times.set(node.row, (times.get(node.row) ?? 0) + endUs - startUs);
  }
  return times;
}

/** Go on with the children of a frame, the last to finish first. */
function nextAwaited(frame) {
  while (frame.children.length) {
    const child = frame.children.pop();
    const shiftUs = frame.shiftUs + shiftOf(child);
    const startUs = Math.max(child.startUs + shiftUs, frame.startUs);
    const endUs = Math.min(child.endUs + shiftUs, frame.endUs);
    if (startUs < endUs && endUs <= frame.nowUs) return frameOf(child, startUs, endUs, shiftUs);
  }
  return null;
}

function frameOf(node, startUs, endUs, shiftUs) {
  const ends = (child) => Math.min(child.endUs + shiftUs + shiftOf(child), endUs);
  // Of those that end together, the longest is taken first, that is: from the end.
  const children = [...node.children].sort(
    (one, other) => ends(one) - ends(other) || other.startUs - one.startUs,
  );
  return { node, startUs, endUs, shiftUs, nowUs: endUs, children };
}

/** What to add to a node's times, beyond its parent's shift, to have its caller's clock. */
function shiftOf(node) {
  return node.row.first === node ? 0 : -node.row.skewUs;
}
