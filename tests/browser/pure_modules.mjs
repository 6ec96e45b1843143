// Answers questions about the viewer's pure modules: a line of JSON in, a line out.
// tests/browser/test_trace_model.py starts it beside a copy of the modules.

import { createInterface } from "node:readline";
import { criticalPath } from "./critical_path.js";
import { layOut, neighbourhood } from "./graph_layout.js";
import { hopTimes } from "./hop_times.js";
import { buildTrace, operation, outcome, rowOfSpan, search, visibleRows } from "./trace_model.js";

const QUESTIONS = {
  trace({ spans, collapsed = [], query = "", wanted = "" }) {
    const started = performance.now();
    const trace = buildTrace(spans);
    const path = criticalPath(trace);
    const tookMs = performance.now() - started;
    const { rows, root, ...facts } = trace;
    const hidden = new Set(rows.filter((row) => collapsed.includes(row.index)));
    return {
      ...facts,
      tookMs,
      root: root.index,
      rows: rows.map((row) => ({
        spans: row.nodes.map((node) => spans.indexOf(node.span)),
        parent: row.parent ? row.parent.index : null,
        depth: row.depth,
        endIndex: row.endIndex,
        trouble: row.trouble,
        skewUs: row.skewUs,
        startUs: row.startUs,
        service: row.service,
        caller: row.caller,
        failed: row.failed,
        operation: operation(row.last.span),
        outcome: outcome(row),
        hop: hopTimes(row),
      })),
      path: path.map(({ node, startUs, endUs, shiftUs }) => ({
        span: node.span.id,
        kind: node.span.kind,
        row: node.row.index,
        startUs,
        endUs,
        shiftUs,
      })),
      visible: visibleRows(rows, hidden).map((row) => row.index),
      found: search(trace, query).map((row) => row.index),
      wanted: rowOfSpan(trace, wanted)?.index ?? null,
    };
  },
  layout({ edges }) {
    const started = performance.now();
    const drawing = layOut(edges);
    return { ...drawing, tookMs: performance.now() - started };
  },
  neighbourhood: ({ edges, service }) => neighbourhood(edges, service),
};

for await (const line of createInterface({ input: process.stdin })) {
  const { question, ...about } = JSON.parse(line);
  console.log(JSON.stringify(QUESTIONS[question](about)));
}
