// OpenAI's JavaScript client against the gateway; prints what it saw.
import OpenAI from 'openai'
import { tell } from './gateway.mjs'

const client = new OpenAI({ baseURL: process.env.GATEWAY + '/v1', apiKey: 'any', maxRetries: 0 })
const messages = [{ role: 'user', content: 'hi' }]
const found = { streamed: '', models: [], kinds: [] }

const stream = await client.chat.completions.create({ model: 'm', messages, stream: true })
for await (const chunk of stream) found.streamed += chunk.choices[0].delta.content ?? ''
const asked = { model: 'm', messages, stream: true, stream_options: { include_usage: true } }
for await (const chunk of await client.chat.completions.create(asked)) found.usage = chunk.usage ?? found.usage
const whole = await client.chat.completions.create({ model: 'm', messages })
found.whole = whole.choices[0].message.content
for await (const model of client.models.list()) found.models.push(model.id)
for await (const event of await client.responses.create({ model: 'm', input: 'hi', stream: true })) {
  found.kinds.push(event.type)
}
const file = new File(['RIFF'], 'a.wav')
found.heard = (await client.audio.transcriptions.create({ model: 'm', file })).text
try {
  await client.chat.completions.create({ model: 'x', messages })
} catch (error) {
  found.error = { name: error.constructor.name, status: error.status, code: error.code }
}
const left = await client.chat.completions.create({ model: 'm', messages, stream: true })
for await (const chunk of left) {
  found.left = chunk.object
  break // closes the connection
}
tell(found)
