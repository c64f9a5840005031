/** Shows on our nodes the texts that they put out: while they run, and after the job has ended. */

import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"
import { ComfyWidgets } from "../../scripts/widgets.js"

const EVENT = "fatezero.text" // as in nodes/sockets.py
const NAME = "info"
const LINE = 13 // pixels of its height, and of the width of a character
const CHARACTER = 6.1
const MOST_LINES = 12 // the rest scrolls

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
    const [width, height] = node.computeSize()
    node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)])
    node.graph?.setDirtyCanvas(true, true)
}

/** The node of an execution id: "7", or "3:7" inside subgraph node 3. */
function nodeOf(id) {
    return String(id).split(":").reduce(
        (node, part) => (node?.subgraph ?? node)?.getNodeById?.(Number(part)), app.rootGraph ?? app.graph)
}

function isOurs(node) {
    return node?.comfyClass?.startsWith("FateZero")
}

app.registerExtension({
    name: "FateZero.Texts",
    setup() {
        api.addEventListener(EVENT, ({ detail }) => {
            const node = nodeOf(detail.node)
            if (node) show(node, detail.text)
        })
    },
    nodeCreated(node) {
        if (!isOurs(node)) return
        const before = node.onExecuted
        node.onExecuted = function (output) {
            before?.apply(this, arguments)
            if (output?.text) show(this, [output.text].flat().join("\n"))
        }
    },
    /** When the page goes back to a workflow whose outputs it kept. */
    onNodeOutputsUpdated(outputs) {
        for (const [id, output] of Object.entries(outputs)) {
            const node = nodeOf(id)
            if (output?.text && isOurs(node)) show(node, [output.text].flat().join("\n"))
        }
    },
})
