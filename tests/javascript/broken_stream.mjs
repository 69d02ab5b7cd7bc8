// OpenAI's JavaScript client on a stream that breaks: it has to throw, not to end.
import OpenAI from 'openai'
import { tell } from './gateway.mjs'

const client = new OpenAI({ baseURL: process.env.GATEWAY + '/v1', apiKey: 'any', maxRetries: 0 })
const messages = [{ role: 'user', content: 'hi' }]
const found = { streamed: '' }
try {
  const stream = await client.chat.completions.create({ model: 'm', messages, stream: true })
  for await (const chunk of stream) found.streamed += chunk.choices[0].delta.content ?? ''
} catch (error) {
  found.error = error.message
}
tell(found)
