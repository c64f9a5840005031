/** Shows on our nodes the texts that they output: while they run, after the job has ended, and after a reload. */

import { app } from "../../scripts/app.js"
import { ComfyWidgets } from "../../scripts/widgets.js"

const NAME = "info"
const LINE = 13 // pixels of its height, and of the width of a character
const CHARACTER = 6.1
const MOST_LINES = 12 // the rest scrolls
const KEPT = "fatezero.texts" // in the session of the browser's tab

const texts = JSON.parse(sessionStorage.getItem(KEPT) ?? "{}") // by the ids of workflow and node
const opened = new Set() // the workflows that this page has opened

function widgetOf(node) {
    const found = node.widgets?.find((widget) => widget.name === NAME)
    if (found) return found
    const { widget } = ComfyWidgets.STRING(node, NAME, ["STRING", { multiline: true }], app)
    widget.serialize = false // neither saved with the workflow
    widget.options.serialize = false // nor queued
    widget.options.read_only = true
    widget.options.getMinHeight = () => 10 + LINE * Math.min(MOST_LINES, linesOf(widget.value, node.size[0] - 40))
    widget.element.readOnly = true
    return widget
}

function linesOf(text, width) {
    const wrapped = (line) => Math.max(1, Math.ceil((line.length * CHARACTER) / width))
    return text.split("\n").reduce((sum, line) => sum + wrapped(line), 0)
}

function show(node, text) {
    if (!text && !node.widgets?.some((widget) => widget.name === NAME)) return
    widgetOf(node).value = text
    keep(node, text)
    const [width, height] = node.computeSize()
    node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)])
    node.graph?.setDirtyCanvas(true, true)
}

function root() {
    return app.rootGraph ?? app.graph
}

function keep(node, text) {
    if (node.graph !== root()) return
    ;(texts[root().id] ??= {})[node.id] = text
    sessionStorage.setItem(KEPT, JSON.stringify(texts))
}

/** What the workflow's nodes showed before the page was reloaded, or nothing where it is opened anew. */
function restore() {
    const graph = root()
    if (opened.has(graph.id)) return
    opened.add(graph.id)
    for (const [id, text] of Object.entries(texts[graph.id] ?? {})) {
        const node = graph.getNodeById(Number(id))
        if (isOurs(node)) show(node, text)
    }
}

/** The node of an execution id: "7", or "3:7" inside subgraph node 3. */
function nodeOf(id) {
    return String(id).split(":").reduce(
        (node, part) => (node?.subgraph ?? node)?.getNodeById?.(Number(part)), root())
}

function isOurs(node) {
    return node?.comfyClass?.startsWith("FateZero")
}

app.registerExtension({
    name: "FateZero.Texts",
    nodeCreated(node) {
        if (!isOurs(node)) return
        const before = node.onExecuted
        node.onExecuted = function (output) {
            before?.apply(this, arguments)
            if (output?.text) show(this, [output.text].flat().join("\n"))
        }
    },
    afterConfigureGraph() {
        restore()
    },
    /** When the page goes back to a workflow whose outputs it kept. */
    onNodeOutputsUpdated(outputs) {
        for (const [id, output] of Object.entries(outputs)) {
            const node = nodeOf(id)
            if (output?.text && isOurs(node)) show(node, [output.text].flat().join("\n"))
        }
    },
})
