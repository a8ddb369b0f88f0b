// The golden vectors through llama.node.mjs, one line of JSON each:
//   npm install @fugood/llama.node && node clients/golden.mjs phone.jsonl [PICTURES]
//   rankwise bundle --replay . --answers phone.jsonl
// PICTURES: a folder with what your own code makes of golden/*-source.*, as 00-device.png … [golden]
import { appendFileSync, existsSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { BuildInfo } from '@fugood/llama.node'
import { GREEDY, context, file, load } from './llama.node.mjs'

const [out, pictures = file('golden')] = process.argv.slice(2)
const { cases, top } = JSON.parse(readFileSync(file('golden/golden.json'), 'utf8'))
const { start_token: start } = JSON.parse(readFileSync(file('prompt.json'), 'utf8'))
const bare = (prompt) => // the runtime puts the start token there
  start.put_by === 'the runtime' && prompt.startsWith(start.text) ? prompt.slice(start.text.length) : prompt
const build = `b${BuildInfo.number}-${BuildInfo.commit} (llama.node)`
// Nothing taken from the model's own; llama.node's default is xtc_probability 0.1 at threshold 0.
const WHOLE = { temperature: 1, top_k: 0, top_p: 1, min_p: 0, xtc_probability: 0, dry_multiplier: 0, penalty_repeat: 1 }

// llama.node 1.7.15 misses the end of a completion that is over before it looks, in a fraction of a millisecond, and then
// takes no other: of models that small a fresh context is asked.
let asked = context
async function completion(options) {
  try {
    const found = await asked.completion(options)
    if (found.context_full) throw new Error(`the context of ${found.tokens_evaluated} tokens is full`)
    return found
  } catch (error) {
    if (!error.message.startsWith('Another completion')) throw error
    asked = await load()
    return completion(options)
  }
}

// The likeliest tokens at each place of the answer. llama.node tells probabilities after sampling, so that each place
// is asked for by itself, and the likeliest token is put behind the prompt.
async function likeliest(options) {
  const places = []
  let said = ''
  while (places.length < GREEDY.n_predict) {
    const { completion_probabilities: all } = await completion({
      ...options, ...WHOLE, prompt: options.prompt + said, n_predict: 1, n_probs: top,
    })
    const place = all.at(-1) // those of earlier calls are before it
    const [best] = place.probs
    places.push(place.probs.map(({ tok_str, prob }) => [tok_str, Math.max(Math.log(prob), -104)]))
    if (GREEDY.stop.includes(best.tok_str) || /^byte: |\ufffd/.test(best.tok_str)) break
    said += best.tok_str
  }
  return places
}

writeFileSync(out, '')
for (const one of cases) {
  const media_paths = one.images.map(({ device }) => join(pictures, device))
  for (const picture of media_paths) if (!existsSync(picture)) throw new Error(`${picture}: missing`)
  const options = { prompt: bare(one.prompt), media_paths }
  const started = performance.now()
  const { text } = await completion({ ...options, ...GREEDY })
  const ms = performance.now() - started
  const { tokens } = await asked.tokenize(options.prompt, { media_paths })
  const png = media_paths.map((picture) => readFileSync(picture).toString('base64'))
  const line = { case: one.id, png, prompt_ids: [...tokens], text, top_logprobs: await likeliest(options), ms, build }
  appendFileSync(out, JSON.stringify(line) + '\n')
}
process.exit() // release() crashes on a context whose completion it missed
